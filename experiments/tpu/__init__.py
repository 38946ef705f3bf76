"""Decode steps on TPUs, predicted without one from what the TPU compiler makes of the kernels.

What may change here: what a prediction counts. The chips' figures are in `pallas_kernels.tpu`.
"""
