"""Pages, and those whose keys and values are kept in 8 bits.

Keys and values of a layer are an array `pages[B, K, P, 2, S, D]`, or such an array of 8-bit codes with a
scale for each token, head, and key or value. A scale belongs to one token, so that overwriting a token
changes nothing of its neighbours.

What codes stand for is code times scale, in float32. References compute with these numbers, of the pages that
they read. A kernel may take the scale out of the products instead, which is the same but for rounding:
(q . code) * scale is the score, and a probability times its value's scale weighs the value's codes, which
bfloat16 holds exactly.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

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

    codes: Int8[Array, "*pages S D"] | Float[Array, "*pages S D"]
    scales: Float[Array, "*pages S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, P, 2, S, D), as of pages that are not quantized."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the codes."""
        return self.codes.dtype

    def at(self, dtype: jnp.dtype | str) -> Float[Array, "*pages S D"]:
        """The pages as numbers: each the product of code and scale in float32, rounded to `dtype`."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


Pages = Float[Array, "B K P 2 S D"] | QuantizedPages
"""Keys (0) and values (1) of one layer, page by page."""


def empty_pages(shape: tuple[int, ...], dtype: jnp.dtype | str) -> Pages:
    """Pages [B, K, P, 2, S, D] of zeros, in 8 bits where `dtype` is one of `CODES`."""
    codes = jnp.zeros(shape, dtype)
    return QuantizedPages(codes, jnp.zeros(shape[:-1], jnp.float32)) if codes.dtype.name in CODES else codes


def dequantized(pages: Float[Array, "*pages S D"] | QuantizedPages) -> Float[Array, "*pages S D"]:
    """What pages hold, or a part of them: those in 8 bits in float32, others as they are."""
    return pages.at("float32") if isinstance(pages, QuantizedPages) else pages


def as_kept(tokens: Float[Array, "*any D"], pages: Pages) -> Float[Array, "*any D"]:
    """Keys or values as they are read back when they have been written to these pages."""
    if isinstance(pages, QuantizedPages):
        return dequantized(QuantizedPages(*quantize(tokens, pages.dtype)))
    return tokens.astype(pages.dtype)


def gather_pages(pages: Pages, page_ids: Int[Array, "B K C"]) -> Float[Array, "B K C 2 S D"]:
    """What the pages of these numbers hold; no other is read."""

    def take(array):
        return jnp.take_along_axis(array, page_ids.reshape(*page_ids.shape, *[1] * (array.ndim - 3)), axis=2)

    return dequantized(jax.tree.map(take, pages))


def slice_pages(pages: Pages, first: Int[Array, ""], count: int) -> Float[Array, "B K C 2 S D"]:
    """What `count` pages from `first` on hold; no other is read."""
    return dequantized(
        jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, first, count, axis=2), pages)
    )


def vector_bytes(head_dim: int, dtype: jnp.dtype | str) -> int:
    """Bytes of one token's key or value, its scale included where `dtype` is one of `CODES`."""
    dtype = jnp.dtype(dtype)
    return head_dim * dtype.itemsize + (4 if dtype.name in CODES else 0)


def check_pages(pages: Array | QuantizedPages) -> None:
    """Raises if pages are no pages.

    Raises:
      TypeError: they are not floating-point numbers, or codes and scales are of other dtypes.
      ValueError: there is not one scale for each key and value.
    """
    if not isinstance(pages, QuantizedPages):
        if not jnp.issubdtype(pages.dtype, jnp.floating) or pages.dtype.name in CODES:
            raise TypeError(
                f"pages are {pages.dtype.name}; give floating-point numbers of 16 bits or more, or codes "
                "with their scales as QuantizedPages"
            )
        return
    codes, scales = pages.codes, pages.scales
    if codes.dtype.name not in CODES or scales.dtype != jnp.float32:
        raise TypeError(
            f"pages have {codes.dtype.name} codes and {scales.dtype.name} scales; use codes in "
            f"{' or '.join(CODES)}, and scales in float32"
        )
    if scales.shape != codes.shape[:-1]:
        raise ValueError(
            f"codes have shape {codes.shape} and scales {scales.shape}; give one scale for each key and "
            f"value, {codes.shape[:-1]}"
        )


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
    tokens = tokens.astype(jnp.float32)
    scales = jnp.max(jnp.abs(tokens), axis=-1) / largest_code(dtype)
    return in_codes(tokens, scales[..., None], dtype), scales


def largest_code(dtype: jnp.dtype | str) -> float:
    """The largest number that is a code."""
    return float(INT8_MAX if jnp.dtype(dtype) == jnp.int8 else jnp.finfo(dtype).max)


def in_codes(
    tokens: Float[Array, "..."], scales: Float[Array, "..."], dtype: jnp.dtype | str
) -> Int8[Array, "..."] | Float[Array, "..."]:
    """Numbers over their scales, each to the nearest code; zeros have scale 0."""
    units = tokens / jnp.where(scales == 0, 1, scales)
    return (jnp.round(units) if jnp.dtype(dtype) == jnp.int8 else units).astype(dtype)
