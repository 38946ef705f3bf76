"""The run-time checker of shape annotations in tests."""

from beartype import beartype


def functions(fn):
    """Checks a function; leaves `__init__` of pytree dataclasses alone, which JAX calls with any leaves."""
    return fn if fn.__name__ == "__init__" else beartype(fn)
