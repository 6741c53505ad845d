# The race: nanoGPT's documented CPU model (4 layers, 128 wide, block 64, characters of Shakespeare)
# to nanoGPT's own final loss.

out_dir = 'out-race-shakespeare'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1

pos = 'rope'
qk_norm = True
act = 'relu2'
tie_weights = False
ngram_buckets = 32768
ngram_order = 4

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.7
muon_steps = 1
learning_rate = 8e-3
min_lr = 0.0
lr_schedule = 'linear'
weight_decay = 0.0
beta1 = 0.7
beta2 = 0.99
warmup_iters = 0
max_iters = 75
lr_decay_iters = 75

eval_interval = 1000
eval_iters = 4
