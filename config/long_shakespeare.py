# The longer line: nanoGPT's GPU run on characters of Shakespeare (6 layers, 384 wide) ends at a val loss of 1.47
# after 82 million tokens. A smaller model and a twenty-fifth of these tokens, for a CPU.

out_dir = 'out-long-shakespeare'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1
dropout = 0.1

pos = 'rope'
qk_norm = True
qk_gain = 2.0
act = 'osc'
tie_weights = False
ngram_buckets = 16384
ngram_order = 3

optimizer = 'muon'
muon_learning_rate = 0.02
muon_momentum = 0.95
learning_rate = 2e-3
min_lr = 0.0
beta2 = 0.99
lr_schedule = 'linear'
weight_decay = 0.1
warmup_iters = 0
max_iters = 800
lr_decay_iters = 800

eval_interval = 200
eval_iters = 25
