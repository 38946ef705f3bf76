"""JAX's settings that everything here is computed under, whatever those of the process are.

A program that uses this library may have turned on 64-bit types, or strict promotion, for code of its own.
What is computed here does not depend on that: its types and its places of broadcasting are chosen, and minus
infinity is a value of its definitions (the log-sum-exp over no keys), not a fault. NaN is one, so
`jax_debug_nans` stays as the process has it, and so does the precision of products. What cannot be decided
here is what a function compiled by the caller may return: one that returns a decode state, whose empty window
has such log-sum-exps, has to be called without `jax_debug_infs`.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax

_SETTINGS = (
    (jax.enable_x64, False),
    (jax.numpy_dtype_promotion, "standard"),
    (jax.numpy_rank_promotion, "allow"),
    (jax.debug_infs, False),
    (jax.threefry_partitionable, True),
    (jax.transfer_guard, "allow"),
)


def under_fixed_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called or traced under the settings above; also inside a trace under other ones."""

    @functools.wraps(function)
    def fixed(*args, **kwargs):
        with ExitStack() as settings:
            for setting, value in _SETTINGS:
                settings.enter_context(setting(value))
            return function(*args, **kwargs)

    return fixed
