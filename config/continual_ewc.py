# The first task's weights are held by their Fisher information.
# python train.py config/train_pylib.py config/continual_ewc.py
out_dir = 'out-continual-ewc'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
ewc = 3.0
