# What forgets least at the same loss on the second task: replay and a gentle pull.
# python train.py config/train_pylib.py config/continual_best.py
out_dir = 'out-continual-best'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
replay = 0.1
ewc = 1.0
