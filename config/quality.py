# The quality preset: the lowest loss that costs no speed, in training or decoding. Three of four layers see the last
# 64 tokens. Goes behind a recipe: python train.py config/train_pylib.py config/quality.py
# Where 10 % of speed may go, config/bio_osc.py behind it lowers the loss further.
out_dir = 'out-quality'
act = 'relu2'
window = 64
window_pattern = 'SSSL'
