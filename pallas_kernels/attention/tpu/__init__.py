"""Attention over pages on TPUs; knows nothing of GPUs."""
