# Bytes of Python, then of Shakespeare, each for as long as the recipe; nothing holds the first.
# python train.py config/train_pylib.py config/continual_finetune.py
out_dir = 'out-continual-finetune'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
