"""Commands whose flags are shown at once: their work, and JAX with it, is imported when it begins.

A command here either imports what it needs within `run`, or has its flags here and its work in a class that
inherits them (`Entry.flags` in `experiments/cli.py`).
"""
