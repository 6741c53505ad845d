# What forgets least at the same loss on the second task: replay, a gentle pull, an adapter for each task.
# python train.py config/train_pylib.py config/continual_best.py, then
# python sample.py --out_dir=out-continual-best --adapter=python
out_dir = 'out-continual-best'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
replay = 0.1
ewc = 0.5
adapters = 'python,english'
