"""Texts that a model writes or reads: the commands `generate` and `score`."""
