"""Pages whose keys and values are kept in 8 bits.

Keys and values of a layer are an array `pages[B, K, P, 2, S, D]`, or such an array of 8-bit codes with a
scale for each token, head, and key or value. A scale belongs to one token, so that overwriting a token
changes nothing of its neighbours.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.statistics import INT8_MAX

CODES = ("int8", "float8_e4m3fn")
"""Dtypes that codes can have."""


@flax.struct.dataclass
class QuantizedPages:
    """Pages in 8 bits.

    Attributes:
      codes: keys and values over their scales; what lies beyond a sequence's length has no meaning.
      scales: the largest magnitude of each token's key or value over the largest code; 0 for zeros.
    """

    codes: Int8[Array, "B K P 2 S D"] | Float[Array, "B K P 2 S D"]
    scales: Float[Array, "B K P 2 S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, P, 2, S, D), as of pages that are not quantized."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the codes."""
        return self.codes.dtype

    def at(self, dtype: jnp.dtype) -> Float[Array, "B K P 2 S D"]:
        """The pages as numbers: each the product of code and scale in float32, rounded to `dtype`."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


Pages = Float[Array, "B K P 2 S D"] | QuantizedPages
"""Keys (0) and values (1) of one layer, page by page."""


def quantize(
    tokens: Float[Array, "*any D"], dtype: jnp.dtype | str
) -> tuple[Int8[Array, "*any D"] | Float[Array, "*any D"], Float[Array, "*any"]]:
    """Keys or values in 8 bits: to the nearest code, in units of the largest magnitude over the largest code.

    Args:
      tokens: vectors.
      dtype: one of `CODES`.

    Returns:
      Codes and float32 scales; a vector of zeros has scale 0.
    """
    dtype, tokens = jnp.dtype(dtype), tokens.astype(jnp.float32)
    largest = INT8_MAX if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scales = jnp.max(jnp.abs(tokens), axis=-1) / largest
    units = tokens / jnp.where(scales == 0, 1, scales)[..., None]
    return (jnp.round(units) if dtype == jnp.int8 else units).astype(dtype), scales
