# Heads of four branches, two open per token. python train.py config/train_pylib.py config/bio_branches.py
out_dir = 'out-bio-branches'
dendrites = 4
dendrites_active = 2
