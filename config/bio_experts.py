# Eight experts, two answer; a dense MLP's parameters. python train.py config/train_pylib.py config/bio_experts.py
act = 'relu2'
experts = 8
experts_active = 2
