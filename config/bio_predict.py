# The predictive sparse MLP: 448 units and a predictor of rank 32 have a dense MLP's weights at 128 wide. With
# --sparse_decode=True a predictor of that rank costs 0.05 to 0.11 nats in what was trained here; screened units
# (--mlp_screen=4), which no training needs, cost 0.001.
# python train.py config/train_pylib.py config/bio_predict.py, then
# python sample.py --out_dir=out-pylib-predict --sparse_decode=True
act = 'relu2'
mlp_units = 448
mlp_topk = 0.1
mlp_predict = 32
mlp_active = 0.2
anneal = 0.25
