# Attention's projections read the larger half of each token's inputs.
# python train.py config/train_pylib.py config/bio_inputs.py
attn_topk = 0.5
