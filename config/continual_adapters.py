# An adapter for each task; the second task trains nothing else, so the first stays as it is.
# python train.py config/train_pylib.py config/continual_adapters.py, then
# python sample.py --out_dir=out-continual-adapters --adapter=english
out_dir = 'out-continual-adapters'
tasks = 'pylib,shakespeare_bytes'
max_iters = 2 * lr_decay_iters
adapters = 'python,english'
freeze = True
