# The 10% largest units of each token fire. python train.py config/train_pylib.py config/bio_topk.py
act = 'relu2'
mlp_topk = 0.1
