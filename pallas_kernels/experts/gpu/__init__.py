"""Products with chosen matrices on Hopper GPUs; knows nothing of TPUs."""
