# A tenth of the second task's rows are of the first.
# python train.py config/train_pylib.py config/continual_replay.py
out_dir = 'out-continual-replay'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
replay = 0.1
