"""Operators: each file holds the plain-PyTorch reference, the Triton kernel and the op."""
