"""Page selection on TPUs; knows nothing of GPUs."""
