# 60 cortical columns of eight units (as many weights as a dense MLP), 15 answer; in the first half of the run
# more do, so that all of them learn. python train.py config/train_pylib.py config/bio_columns.py
act = 'relu2'
mlp_units = 480
columns = 60
columns_active = 15
anneal = 0.5
