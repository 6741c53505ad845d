# Characters of Shakespeare on a laptop: nanoGPT's documented CPU settings, about a minute to val loss 1.9.

out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
lr_decay_iters = 2000
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 20
always_save_checkpoint = False
