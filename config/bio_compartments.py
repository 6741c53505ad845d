# Neurons with four dendritic branches. python train.py config/train_pylib.py config/bio_compartments.py
act = 'relu2'
compartments = 4
