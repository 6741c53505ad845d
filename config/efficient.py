# The efficient preset: three of four layers see the last 64 tokens, a decode step reads a fifth of the MLP's
# units (predicted), 9/16 of attention's weights (2:4) and half of the head's (8 bits first). Goes behind a recipe:
# python train.py config/train_pylib.py config/efficient.py, then
# python sample.py --out_dir=out-efficient --sparse_decode=True
out_dir = 'out-efficient'
act = 'relu2'
mlp_units = 448
mlp_topk = 0.1
mlp_predict = 32
mlp_active = 0.2
anneal = 0.25
weights = '2:4'
window = 64
window_pattern = 'SSSL'
screen = True
