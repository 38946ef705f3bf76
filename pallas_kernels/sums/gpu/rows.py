"""Rows of the residual stream in the registers of a warpgroup."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gpu import row_layout

Row = list[Array]
"""Pieces of one row."""

_AT_ONCE = 4
"""Neighbouring numbers that a thread loads at once: 16 bytes of float32."""
_EVEN = 128 * _AT_ONCE
UNIT = 16
"""Columns of a row are a multiple of this."""


@dataclass(frozen=True)
class Rows:
    """How rows of `width` numbers are held: in pieces that lie evenly over the threads.

    The first piece has all that they can load in whole words. What is left is cut into powers of two.
    """

    width: int

    @property
    def _places(self) -> list[tuple[Any, Any]]:
        """Columns of each piece, and its layout."""
        even = self.width - self.width % _EVEN
        places = []
        if even:
            layout = plgpu.Layout.WG_STRIDED((even,), vec_size=_AT_ONCE)
            places.append((pl.ds(0, even), layout))
        size = _EVEN // 2
        while size >= UNIT:
            if self.width & size:
                places.append((pl.ds(self.width & -2 * size, size), row_layout(size)))
            size //= 2
        return places

    def load(self, ref: Any, *place: Any) -> Row:
        """The row at a place of global memory."""
        return [plgpu.load(ref.at[(*place, at)], layout=by, optimized=False) for at, by in self._places]

    def store(self, ref: Any, place: tuple, row: Row) -> None:
        """Writes a row to global memory, in the dtype of what is there."""
        for (at, _), values in zip(self._places, row, strict=True):
            ref[(*place, at)] = values.astype(ref.dtype)


def normed(row: Row, weight: Row, eps: float) -> Row:
    """The root-mean-square norm of a row, in float32."""
    squares = sum(jnp.sum(values * values) for values in row)
    scale = lax.rsqrt(squares / sum(values.size for values in row) + eps)
    return [values * scale * by.astype(jnp.float32) for values, by in zip(row, weight, strict=True)]


def single(row: Row) -> list[Float[Array, " columns"]]:
    """A row in float32."""
    return [values.astype(jnp.float32) for values in row]
