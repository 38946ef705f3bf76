"""Sums over the memory of Hopper GPUs of one process; knows nothing of TPUs."""
