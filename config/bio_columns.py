# 32 cortical columns, eight answer; in the first half of the run more do, so that all of them learn.
# python train.py config/train_pylib.py config/bio_columns.py
out_dir = 'out-bio-columns'
act = 'relu2'
columns = 32
columns_active = 8
anneal = 0.5
