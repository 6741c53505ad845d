# The third of four layers runs up to four times, as often as each token needs.
# python train.py config/train_pylib.py config/bio_ponder.py
ponder = 4
