# The predictive sparse MLP. python train.py config/train_pylib.py config/bio_predict.py, then
# python sample.py --out_dir=out-bio-predict --policy=True
out_dir = 'out-bio-predict'
act = 'relu2'
mlp_topk = 0.1
mlp_predict = 32
mlp_active = 0.2
