"""Text to token ids and batches: tokenizers, data sets, corpora; a prepare.py in each data set's folder."""
