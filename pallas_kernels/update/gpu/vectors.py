"""Vectors of heads in registers, in one piece or in halves, and queries and keys made of a joined product.

The rotary embedding pairs a channel of one half with that of the other, so a thread has both.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gpu import row_layout

Vector = list[Array]
"""Pieces of one vector."""


@dataclass(frozen=True)
class Vectors:
    """How vectors of `channels` are held: in so many `pieces`."""

    channels: int
    pieces: int

    @property
    def _places(self):
        width = self.channels // self.pieces
        return [pl.ds(first, width) for first in range(0, self.channels, width)]

    @property
    def _layout(self):
        return row_layout(self.channels // self.pieces)

    def load(self, ref: Any, *place: Any) -> Vector:
        """The vector at a place of global memory."""
        return [plgpu.load(ref.at[(*place, at)], layout=self._layout, optimized=False) for at in self._places]

    def load_sum(self, ref: Any, *place: Any) -> Vector:
        """The sum, in float32, of those at a place of each of the first axis; one alone as it is."""
        if ref.shape[0] == 1:
            return self.load(ref, 0, *place)
        parts = self.load(ref, slice(None), *place)
        return [plgpu.layout_cast(piece.astype(jnp.float32).sum(axis=0), self._layout) for piece in parts]

    def store(self, ref: Any, place: tuple, vector: Vector) -> None:
        """Writes a vector to global memory, in the dtype of what is there."""
        for at, values in zip(self._places, vector, strict=True):
            ref[(*place, at)] = values.astype(ref.dtype)


def largest(vector: Vector) -> Float[Array, ""]:
    """The largest magnitude of a vector."""
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(values)) for values in vector])


@dataclass(frozen=True)
class Product:
    """What queries, keys and values are made of.

    Attributes:
      vectors: how they are held; in halves if they are rotated.
      dtype: of what is made.
      heads: the product's vectors[parts, B, rows, heads, D], parts of sums.
      bias: of each, [heads, D]; None: there is none.
      cos: of the angles of each token, [B, T, D / 2]; None: nothing is rotated.
      sin: likewise.
      norm_eps: of the norms.
    """

    vectors: Vectors
    dtype: Any
    heads: Any
    bias: Any
    cos: Any
    sin: Any
    norm_eps: float

    def vector(
        self, b: Any, t: Any, column: Any, norm: Any = None, scale: float = 1.0, turn: bool = False
    ) -> Vector:
        """A query, key or value: sum, bias, norm, scale and rotation in float32."""
        found = self.vectors.load_sum(self.heads, b, t, column)
        turn = turn and self.cos is not None
        if self.bias is None and norm is None and scale == 1 and not turn:
            return [values.astype(self.dtype) for values in found]
        found = [values.astype(jnp.float32) for values in found]
        if self.bias is not None:
            bias = self.vectors.load(self.bias, column)
            found = [values + more.astype(jnp.float32) for values, more in zip(found, bias, strict=True)]
        if norm is not None:
            squares = jnp.sum(functools.reduce(jnp.add, [values * values for values in found]))
            by = lax.rsqrt(squares / self.vectors.channels + self.norm_eps)
            weights = [weight.astype(jnp.float32) for weight in self.vectors.load(norm)]
            found = [values * by * weight for values, weight in zip(found, weights, strict=True)]
        if scale != 1:
            found = [values * scale for values in found]
        if turn:
            first, second = found
            half = Vectors(self.vectors.channels // 2, 1)
            (cos,), (sin,) = (half.load(ref, b, t) for ref in (self.cos, self.sin))
            found = [first * cos - second * sin, second * cos + first * sin]
        return [values.astype(self.dtype) for values in found]
