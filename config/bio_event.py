# Units with learned thresholds, a tenth open. python train.py config/train_pylib.py config/bio_event.py
act = 'relu2'
event_gate = True
event_rate = 0.1
