# The middle layers run on groups of four tokens. python train.py config/train_pylib.py config/bio_hierarchy.py
hierarchy = 4
