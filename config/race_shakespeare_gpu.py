# The fast sibling of config/train_shakespeare_char.py, for one GPU: the same model and context by the race's
# recipe, an eighth of the iterations. Aims at nanoGPT's val loss of 1.47; no card has run it.

out_dir = 'out-race-shakespeare-gpu'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1
dropout = 0.2

pos = 'rope'
qk_norm = True
qk_gain = 2.0
act = 'relu2'
tie_weights = False
ngram_buckets = 16384
ngram_order = 3

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.95
muon_steps = 4
learning_rate = 2e-3
min_lr = 0.0
lr_schedule = 'linear'
weight_decay = 0.1
beta2 = 0.99
warmup_iters = 0
max_iters = 600
lr_decay_iters = 600

eval_interval = 200
eval_iters = 25
