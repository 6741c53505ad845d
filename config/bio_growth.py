# Four layers that grow up: one, then two, then all. python train.py config/train_pylib.py config/bio_growth.py
grow = '1:0.2,2:0.3'
