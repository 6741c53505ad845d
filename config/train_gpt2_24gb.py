# GPT-2 124M from scratch on OpenWebText on one card with 24 GB: nanoGPT's half million tokens an iteration.
# Computed, not measured on the card: 1.9 GiB of weights, gradients and AdamW and 1.0 GiB a sequence make
# 21.7 GiB (python bench.py memory); with --recompute=True a sequence takes 0.6 GiB.

out_dir = 'out-gpt2'
dataset = 'openwebtext'

batch_size = 20
block_size = 1024
gradient_accumulation_steps = 24
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
