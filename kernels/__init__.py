"""Fused operations: one file an op, holding its maths, its plain-torch reference and its kernels; `backend` says what serves each."""
