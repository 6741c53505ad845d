# Sixteen cortical columns, four answer. python train.py config/train_pylib.py config/bio_columns.py
out_dir = 'out-bio-columns'
act = 'relu2'
columns = 16
columns_active = 4
