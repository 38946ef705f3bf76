"""What is kept about a page, so that it can be scored without loading it.

A statistic is `vectors` vectors of head_dim per page, computed from the page's keys over the tokens
written so far. `"min_max"` is Quest's metadata (arXiv 2406.10774, section 3.3).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

_INT8_MAX = 127


@flax.struct.dataclass
class Quantized:
    """Vectors of 8-bit integers, each with its own scale.

    Attributes:
      values: the vectors over their scales, in -127..127.
      scales: the largest magnitude of each vector over 127.
    """

    values: Int8[Array, "*rows D"]
    scales: Float[Array, " *rows"]

    def at_float32(self) -> Float[Array, "*rows D"]:
        """The vectors, to within half a scale."""
        return self.values.astype(jnp.float32) * self.scales[..., None]


Statistics = Float[Array, "B K P Z D"] | Quantized
"""Page statistics of one layer."""


def quantize(vectors: Float[Array, "*rows D"]) -> Quantized:
    """The nearest 8-bit vectors; a vector of zeros has scale 0."""
    scales = jnp.max(jnp.abs(vectors.astype(jnp.float32)), axis=-1) / _INT8_MAX
    units = vectors / jnp.where(scales == 0, 1, scales)[..., None]
    return Quantized(values=jnp.round(units).astype(jnp.int8), scales=scales)


@dataclass(frozen=True)
class PageStatistics:
    """A kind of page statistic.

    Attributes:
      vectors: vectors kept per page (Z).
      compute: (keys[..., S, D], valid[..., S]) -> [..., Z, D] in the keys' dtype; what lies at invalid
        places does not matter, NaN included.
      quantized: whether they are kept as `Quantized`.
    """

    vectors: int
    compute: Callable[[Float[Array, "... S D"], Bool[Array, "... S"]], Float[Array, "... Z D"]]
    quantized: bool = False

    def zeros(self, pages: tuple[int, ...], head_dim: int, dtype: str) -> Statistics:
        """Statistics of pages [B, K, P] without any token."""
        vectors = jnp.zeros((*pages, self.vectors, head_dim), dtype)
        return quantize(vectors) if self.quantized else vectors

    def vector_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of one vector where keys have `itemsize` bytes a channel."""
        return head_dim + 4 if self.quantized else head_dim * itemsize


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
    "mean_key_int8": PageStatistics(vectors=1, compute=_mean_key, quantized=True),
}
