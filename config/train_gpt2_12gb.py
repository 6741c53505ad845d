# GPT-2 124M from scratch on OpenWebText on one card with 12 GB: nanoGPT's half million tokens an iteration.
# Computed, not measured on the card: 2.0 GiB of weights, gradients and AdamW and 0.48 GiB a sequence make
# 9.7 GiB (python bench.py memory); without loss_chunks a sequence takes 1.0 GiB.

out_dir = 'out-gpt2'
dataset = 'openwebtext'

batch_size = 16
block_size = 1024
gradient_accumulation_steps = 30
loss_chunks = 8
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
