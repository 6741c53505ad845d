# 2:4 weights: of every four weights of an output two are kept. Sampling packs them.
# python train.py config/train_pylib.py config/bio_two_of_four.py
weights = '2:4'
