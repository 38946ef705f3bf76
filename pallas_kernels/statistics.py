"""What is kept about a page, so that it can be scored without loading it.

A statistic is `vectors` vectors of head_dim per page, computed from the page's keys over the tokens
written so far. `"min_max"` is Quest's metadata (arXiv 2406.10774, section 3.3).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class PageStatistics:
    """A kind of page statistic.

    Attributes:
      vectors: vectors kept per page (Z).
      compute: (keys[..., S, D], valid[..., S]) -> [..., Z, D] in the keys' dtype; what lies at invalid
        places does not matter, NaN included.
    """

    vectors: int
    compute: Callable[[Float[Array, "... S D"], Bool[Array, "... S"]], Float[Array, "... Z D"]]


def _min_max(keys: Float[Array, "... S D"], valid: Bool[Array, "... S"]) -> Float[Array, "... 2 D"]:
    valid = valid[..., None]
    low = jnp.min(jnp.where(valid, keys, jnp.inf), axis=-2)
    high = jnp.max(jnp.where(valid, keys, -jnp.inf), axis=-2)
    return jnp.stack([low, high], axis=-2)


def _mean_key(keys: Float[Array, "... S D"], valid: Bool[Array, "... S"]) -> Float[Array, "... 1 D"]:
    valid = valid[..., None]
    total = jnp.sum(jnp.where(valid, keys.astype(jnp.float32), 0.0), axis=-2, keepdims=True)
    count = jnp.maximum(jnp.sum(valid, axis=-2, keepdims=True), 1)
    return (total / count).astype(keys.dtype)


STATISTICS: Mapping[str, PageStatistics] = {
    "min_max": PageStatistics(vectors=2, compute=_min_max),
    "mean_key": PageStatistics(vectors=1, compute=_mean_key),
}
