# Four times the context of a recipe of 64, the same tokens an iteration; sharper attention, because one key
# must win over 256 others. Goes behind the recipe, before a block:
# python train.py config/compare_pylib.py config/longer_context.py config/bio_window.py
block_size = 256
batch_size = 5
qk_norm = True
qk_gain = 2.0
