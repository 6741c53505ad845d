# The built-in run: bytes of the Python standard library, one to two minutes on two CPU cores.
# Behind it, a block: python train.py config/train_pylib.py config/bio_predict.py trains its sparse twin.

out_dir = 'out-pylib'
dataset = 'pylib'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

norm = 'rmsnorm'
pos = 'rope'
qk_norm = True
qk_gain = 2.0
act = 'relu2'

optimizer = 'muon'
muon_steps = 4
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = 'linear'
weight_decay = 0.0
beta2 = 0.99
warmup_iters = 0
max_iters = 1000
lr_decay_iters = 1000

eval_interval = 250
eval_iters = 20
