# The lossless preset: what reads fewest bytes in a decode step at no loss that matters (+0.24% on a trained model of
# 63 M weights, 39% of the bytes). A 4-bit copy of W_up picks 15% of the MLP's units, attention's output matrix
# reads the largest nine tenths of its inputs; training is a dense model's but for those. Goes behind a recipe:
# python train.py config/train_pylib.py config/lossless.py, then
# python sample.py --out_dir=out-lossless --sparse_decode=True --quantize=attn=8,mlp=4,head=4
# A trained model with squared ReLU needs no training: python sample.py --out_dir=RUN --mlp_screen=4 --attn_topk=0.9
out_dir = 'out-lossless'
act = 'relu2'
mlp_screen = 4
mlp_live = 0.15
attn_topk = 0.9
