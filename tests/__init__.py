"""Mirrors the packages: tests of `X` are in `tests.X`."""
