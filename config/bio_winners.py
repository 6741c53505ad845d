# Two winners of every four neighbours. python train.py config/train_pylib.py config/bio_winners.py
act = 'relu2'
mlp_topk = 0.5
mlp_topk_group = 4
