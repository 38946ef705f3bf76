"""Decode steps on TPUs, predicted without one from what the TPU compiler makes of the kernels."""
