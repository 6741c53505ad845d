"""Looking at runs and at decoding: figures, traces, conversations."""
