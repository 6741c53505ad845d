# The lossless preset: the fastest decode at no loss that matters (+0.25%, 1.8 to 2.0 times the tokens/s in bf16, on a
# trained model of 63 M weights). A 4-bit copy of W_up picks 15% of the MLP's units, and the head is looked at in 8 bits
# first where it is not in whole numbers itself; training is a dense model's. Goes behind a recipe:
# python train.py config/train_pylib.py config/lossless.py, then
# python sample.py --out_dir=out-lossless --sparse_decode=True --quantize=attn=8,mlp=4,head=4
# A trained model with squared ReLU needs no training: python sample.py --out_dir=RUN --mlp_screen=4
out_dir = 'out-lossless'
act = 'relu2'
mlp_screen = 4
mlp_live = 0.15
screen = True
