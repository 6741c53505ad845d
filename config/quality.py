# The quality preset: GELU and windows of 64 tokens in three of four layers, both as fast as what they replace.
# Goes behind a recipe: python train.py config/train_pylib.py config/quality.py
out_dir = 'out-quality'
act = 'gelu'
window = 64
window_pattern = 'SSSL'
