# The efficient preset: the fastest decode at some 2% of loss. A 4-bit copy of W_up picks 10% of the MLP's units, three
# of four layers see the last 64 tokens, and the head is looked at in 8 bits first. Goes behind a recipe:
# python train.py config/train_pylib.py config/efficient.py, then
# python sample.py --out_dir=out-efficient --sparse_decode=True --quantize=q4_all
# A trained model with squared ReLU needs no training: python sample.py --out_dir=RUN --mlp_screen=4 --mlp_live=0.1
out_dir = 'out-efficient'
act = 'relu2'
mlp_screen = 4
mlp_live = 0.1
window = 64
window_pattern = 'SSSL'
screen = True
