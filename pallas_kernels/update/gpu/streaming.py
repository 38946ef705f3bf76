"""The page statistics of `pallas_kernels.statistics` once more, key by key, as kernels compute them."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Keys = Sequence[tuple[Float[Array, " D"], Bool[Array, ""]]]
"""Keys, and whether each counts."""


def _reduce(combine: Callable, initial: float, keys: Keys) -> Float[Array, " D"]:
    return functools.reduce(
        combine,
        [
            jnp.where(jnp.broadcast_to(valid, key.shape), key.astype(jnp.float32), initial)
            for key, valid in keys
        ],
    )


def _min_max(keys: Keys) -> list[Float[Array, " D"]]:
    return [_reduce(jnp.minimum, jnp.inf, keys), _reduce(jnp.maximum, -jnp.inf, keys)]


def _mean_key(keys: Keys) -> list[Float[Array, " D"]]:
    count = functools.reduce(jnp.add, [valid.astype(jnp.float32) for _, valid in keys])
    return [_reduce(jnp.add, 0.0, keys) / jnp.maximum(count, 1.0)]


STREAMING: Mapping[str, Callable[[Keys], list[Float[Array, " D"]]]] = {
    "min_max": _min_max,
    "mean_key": _mean_key,
}
