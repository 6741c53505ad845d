# The recipe in which blocks are compared with their dense twin: bytes of the Python standard library.
# python train.py config/compare_pylib.py config/bio_topk.py trains one arm.

out_dir = 'out-compare'
dataset = 'pylib'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 20
gradient_accumulation_steps = 1

norm = 'rmsnorm'
pos = 'rope'
qk_norm = True
act = 'relu2'

optimizer = 'muon'
muon_learning_rate = 0.02
muon_steps = 4
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = 'linear'
weight_decay = 0.0
beta2 = 0.99
warmup_iters = 0
max_iters = 1000
lr_decay_iters = 1000

eval_interval = 1000
eval_iters = 20
