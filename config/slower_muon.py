# Half the learning rate of Muon: behind config/longer_context.py one of two dense runs of 4 million tokens learnt to
# copy from its context at this rate, none of three at 0.02 (docs/table.md).
# python train.py config/compare_pylib.py config/longer_context.py config/slower_muon.py
muon_learning_rate = 0.01
