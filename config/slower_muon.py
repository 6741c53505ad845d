# Half the learning rate of Muon: behind config/longer_context.py a run of a few million tokens learns to copy from
# its context at this rate more often, and sooner, than at 0.02 (docs/table.md).
# python train.py config/compare_pylib.py config/longer_context.py config/slower_muon.py
muon_learning_rate = 0.01
