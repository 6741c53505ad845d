# Four times the context of a recipe of 64, the same tokens an iteration. Goes behind it, before a block:
# python train.py config/compare_pylib.py config/longer_context.py config/bio_window.py
block_size = 256
batch_size = 5
