"""Texts that a model writes or reads: the commands `generate` and `score`.

What may change here: how they talk to a user; decoding itself is the library's.
"""
