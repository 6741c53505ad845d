"""Decoding: what a call carries, the KV cache, sampling, speculation."""
