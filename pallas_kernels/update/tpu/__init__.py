"""The page update on TPUs; knows nothing of GPUs."""
