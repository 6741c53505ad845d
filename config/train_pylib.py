# The built-in run: bytes of the Python standard library, about two minutes on two CPU cores.

out_dir = 'out-pylib'
dataset = 'pylib'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 2500
lr_decay_iters = 2500
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 20
