# Six layers with exits after two and four. python train.py config/train_pylib.py config/bio_exits.py, then
# python sample.py --out_dir=out-pylib-exits --exit_threshold=0.8 or --speculate=4
n_layer = 6
exits = '2,4'
layer_dropout = 0.1
