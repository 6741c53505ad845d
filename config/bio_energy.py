# One budget for all gates: units with learned thresholds and branches of the one head may together leave open
# a fifth of the multiply-adds that they can close. python train.py config/train_pylib.py config/bio_energy.py
act = 'gelu'
event_gate = True
n_head = 1
dendrites = 4
dendrites_active = 4
energy_budget = 0.2
