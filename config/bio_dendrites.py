# One head of four branches, each as wide as a head of the recipe; two open per token.
# python train.py config/train_pylib.py config/bio_dendrites.py
n_head = 1
dendrites = 4
dendrites_active = 2
