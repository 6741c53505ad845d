# Oscillating units. Goes behind a recipe: python train.py config/train_pylib.py config/bio_osc.py
act = 'osc'
