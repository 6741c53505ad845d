"""Kernels of the sparse operations: what sparse_kernels.py dispatches to."""
