# Three of four layers see the last 64 tokens. python train.py config/train_pylib.py config/bio_window.py
window = 64
window_pattern = 'SSSL'
