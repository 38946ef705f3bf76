"""Attention over pages on Hopper GPUs; knows nothing of TPUs."""
