"""What the entry points of all kernels share: one trace for all layers, one way to say what is supported."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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


def check_supported(operation: str, kernel: str, **values: tuple[Any, tuple]) -> None:
    """Refuses what no kernel of a backend supports.

    Args:
      operation: its name.
      kernel: the backend's name, in words.
      **values: by its name, a value and what is supported.

    Raises:
      NotImplementedError: naming the value and what is supported.
    """
    for name, (value, supported) in values.items():
        if value not in supported:
            say = (lambda dtype: jnp.dtype(dtype).name) if name == "dtype" else str
            raise NotImplementedError(
                f"{operation}: {name} {say(value)} has no {kernel} kernel ({', '.join(map(say, supported))})"
            )
