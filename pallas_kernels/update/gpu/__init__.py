"""The page update on Hopper GPUs; knows nothing of TPUs."""
