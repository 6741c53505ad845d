# The byte-level model behind compress.py: the built-in run with hashed n-grams, twice the context, three times
# the iterations.
# python train.py config/train_pylib.py config/compress_pylib.py && python -m data.compress c FILE

out_dir = 'out-compress'

block_size = 256
tie_weights = False
ngram_buckets = 65536
ngram_order = 5

max_iters = 3000
lr_decay_iters = 3000
