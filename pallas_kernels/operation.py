"""What the entry points of all kernels share: one trace for all layers, one way to say what is supported."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

_only_asked = ContextVar("only_asked", default=False)


class Accepted(Exception):
    """Raised in place of its launch by a kernel that was only asked whether it takes its arguments."""


@contextmanager
def only_asked() -> Iterator[None]:
    """A context in which no kernel is traced: it refuses its arguments as ever, or raises `Accepted`."""
    token = _only_asked.set(True)
    try:
        yield
    finally:
        _only_asked.reset(token)


def before_launch() -> None:
    """What a kernel calls when it has refused what it does not take."""
    if _only_asked.get():
        raise Accepted


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces and lowers an operation once for all layers that call it with the same shapes.

    Args:
      function: takes arrays as positional, all else as keyword arguments; sequences are the first one's first
        axis.

    Raises:
      NotImplementedError: calls without a sequence, for which there is no grid to launch.
    """
    static = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    traced_once = jax.jit(function, static_argnames=static)

    @functools.wraps(function)
    def entry(*arrays, **options):
        if arrays[0].shape[0] == 0:
            raise NotImplementedError("a batch of 0 sequences has no kernel (1 or more)")
        return traced_once(*arrays, **options)

    return entry


def check_supported(kernel: str, **values: tuple[Any, tuple]) -> None:
    """Refuses what no kernel of a backend supports.

    Args:
      kernel: the backend's name, in words.
      **values: by its name, a value and what is supported.

    Raises:
      NotImplementedError: naming the value and what is supported.
    """
    for name, (value, supported) in values.items():
        if value not in supported:
            say = (lambda dtype: jnp.dtype(dtype).name) if name == "dtype" else str
            raise NotImplementedError(
                f"{name} {say(value)} has no {kernel} kernel ({', '.join(map(say, supported))})"
            )


def check_registered(what: str, name: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError if something's name is taken by another, or is none."""
    if not name or name in known:
        raise ValueError(f"{what} has a name that is taken or empty; choose another than {', '.join(known)}")
