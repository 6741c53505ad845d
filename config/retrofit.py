# What a trained model goes on with, on top of config/train_pylib.py: python train.py --init_from=out-pylib --block=window
# A tenth of the rates that a new model begins with: higher ones undo what is learnt (docs/retrofit.md has the figures).

learning_rate = 3e-4
muon_learning_rate = 2e-3
min_lr = 0.0
max_iters = 250
lr_decay_iters = 250
