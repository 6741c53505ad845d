# Neurons with four dendritic branches. python train.py config/train_pylib.py config/bio_dendrites.py
out_dir = 'out-bio-dendrites'
act = 'relu2'
compartments = 4
