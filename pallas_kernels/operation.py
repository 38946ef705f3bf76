"""How every kernel's entry point is traced: once for all layers."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces and lowers an operation once for all layers that call it with the same shapes.

    Args:
      function: takes arrays as positional, all else as keyword arguments.
    """
    static = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return jax.jit(function, static_argnames=static)
