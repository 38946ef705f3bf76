"""Page selection on Hopper GPUs; knows nothing of TPUs."""
