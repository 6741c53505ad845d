# A baby GPT on the characters of Shakespeare, for one GPU: a few minutes to a validation loss near 1.47.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
gradient_accumulation_steps = 1

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
always_save_checkpoint = False          # it overfits: keep the best
