"""What is kept about a page, so that it can be scored without loading it.

A statistic is Z vectors of head_dim per page, each folded from the keys, or the values, of the tokens written
so far. Its one definition is a `PageStatistic`; the reference and the kernels of the page update, the bytes
that it takes and how it is spread over devices all follow from that.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import check_registered
from pallas_kernels.settings import under_fixed_settings

INT8_MAX = 127


@flax.struct.dataclass
class Statistics:
    """Page statistics of one layer.

    Attributes:
      values: the vectors; where they are kept in 8 bits, over their scales, in -127..127.
      scales: None, or of 8-bit vectors the largest magnitude of each over 127.
      kind: name in `STATISTICS`.
    """

    values: Float[Array, "*pages Z D"] | Int8[Array, "*pages Z D"]
    scales: Float[Array, "*pages Z"] | None = None
    kind: str = flax.struct.field(pytree_node=False, default="min_max")

    def at_float32(self) -> Float[Array, "*pages Z D"]:
        """The vectors in float32 if they are kept in 8 bits, to within half a scale; else as they are."""
        if self.scales is None:
            return self.values
        return self.values.astype(jnp.float32) * self.scales[..., None]


@dataclass(frozen=True)
class Fold:
    """How tokens become one.

    Attributes:
      identity: of a token that does not count.
      combine: of two arrays.
      along: of many, along an axis.
      finish: (all combined, the number of tokens that count) -> result; None if nothing is left to do.
    """

    identity: float
    combine: Callable[[Array, Array], Array]
    along: Callable[..., Array]
    finish: Callable[[Array, Array], Array] | None = None


LOWEST = Fold(jnp.inf, jnp.minimum, jnp.min)
HIGHEST = Fold(-jnp.inf, jnp.maximum, jnp.max)
MEAN = Fold(0.0, jnp.add, jnp.sum, lambda total, count: total / jnp.maximum(count, 1))


@dataclass(frozen=True)
class PageVector:
    """One vector of a statistic, in float32.

    Attributes:
      fold: how tokens become one.
      of: `KEYS` or `VALUES`.
      term: of each token before it is folded, channel by channel.
    """

    fold: Fold
    of: int = KEYS
    term: Callable[[Array], Array] = lambda tokens: tokens

    def of_page(self, tokens: Float[Array, "... S D"], valid: Bool[Array, "... S #D"]) -> Array:
        """The vector [..., 1, D] of whole pages, of which some tokens are valid; others may be NaN."""
        terms = jnp.where(valid, self.term(tokens), self.fold.identity)
        total = self.fold.along(terms, axis=-2, keepdims=True)
        if self.fold.finish is None:
            return total
        return self.fold.finish(total, jnp.sum(jnp.where(valid, 1.0, 0.0), axis=-2, keepdims=True))

    def of_tokens(self, tokens: Sequence[tuple[Float[Array, " D"], Bool[Array, ""]]]) -> Float[Array, " D"]:
        """The vector [D] of a page's keys or values one by one, each with whether it is valid."""
        if self.fold.finish is not None:
            count = functools.reduce(jnp.add, [valid.astype(jnp.float32) for _, valid in tokens])
        terms = [
            jnp.where(
                jnp.broadcast_to(valid, token.shape),
                self.term(token.astype(jnp.float32)),
                self.fold.identity,
            )
            for token, valid in tokens
        ]
        total = functools.reduce(self.fold.combine, terms)
        return total if self.fold.finish is None else self.fold.finish(total, count)


@dataclass(frozen=True)
class PageStatistic:
    """A kind of page statistic.

    Attributes:
      name: what it is asked for by.
      parts: its Z vectors.
      quantized: whether they are kept in 8 bits, each with a scale of its own.
    """

    name: str
    parts: tuple[PageVector, ...]
    quantized: bool = False

    @property
    def vectors(self) -> int:
        """Vectors kept per page (Z)."""
        return len(self.parts)

    def fused_by(self, kernels: str | None) -> bool:
        """Whether kernels compute it while they write pages; else it follows in a pass of its own.

        Args:
          kernels: name of an implementation, None on a device without kernels. Those of TPUs write one vector
            in 8 bits.
        """
        writes = not self.quantized or kernels != "mosaic_tpu" or self.vectors == 1
        return writes and self.vectors <= 2 and all(part.of == KEYS for part in self.parts)

    def compute(
        self, pages: Float[Array, "... 2 S D"], valid: Bool[Array, "... S"]
    ) -> Float[Array, "... Z D"]:
        """Of whole pages, in their dtype, or in float32 if 8 bits are made of it.

        What lies at invalid places does not matter, NaN included.
        """
        tokens = {part.of: pages[..., part.of, :, :].astype(jnp.float32) for part in self.parts}
        parts = [part.of_page(tokens[part.of], valid[..., None]) for part in self.parts]
        return jnp.concatenate(parts, axis=-2).astype(jnp.float32 if self.quantized else pages.dtype)

    def keep(self, vectors: Float[Array, "*pages Z D"]) -> Statistics:
        """Vectors as they are kept; of 8 bits the nearest, and a vector of zeros has scale 0."""
        if not self.quantized:
            return Statistics(vectors, None, self.name)
        scales = jnp.max(jnp.abs(vectors.astype(jnp.float32)), axis=-1) / INT8_MAX
        return Statistics(in_units(vectors, scales[..., None]), scales, self.name)

    def zeros(self, pages: tuple[int, ...], head_dim: int, dtype: str) -> Statistics:
        """Statistics of pages [B, K, P] without any token."""
        return self.keep(jnp.zeros((*pages, self.vectors, head_dim), dtype))

    def vector_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of one vector where keys have `itemsize` bytes a channel."""
        return head_dim + 4 if self.quantized else head_dim * itemsize


def in_units(vectors: Float[Array, "..."], scales: Float[Array, "..."]) -> Int8[Array, "..."]:
    """Vectors over their scales, each number to the nearest of -127..127; a vector of zeros has scale 0."""
    return jnp.round(vectors / jnp.where(scales == 0, 1, scales)).astype(jnp.int8)


STATISTICS: Mapping[str, PageStatistic] = {}
"""By name; filled by `register_statistic`."""


@under_fixed_settings
def register_statistic(statistic: PageStatistic) -> None:
    """Makes a kind of page statistic known by its name, here and to `DecodeConfig`.

    See `pallas_kernels.register_score` for an example.

    Args:
      statistic: of any number of vectors. Kernels compute one or two of keys while they write, those for
        TPUs one in 8 bits; the others run through the reference.

    Raises:
      ValueError: the name is taken; it has no vector, or one not of keys or values, or not float32[..., D].
    """
    name = f"statistic {statistic.name!r}"
    check_registered(name, statistic.name, STATISTICS)
    if not statistic.parts:
        raise ValueError(f"{name} has no vector; give 1 part or more")
    tokens, valid = jax.ShapeDtypeStruct((3, 5, 8), jnp.float32), jax.ShapeDtypeStruct((3, 5, 1), bool)
    for index, part in enumerate(statistic.parts):
        if part.of not in (KEYS, VALUES):
            raise ValueError(f"part {index} of {name} is of {part.of!r}; use KEYS or VALUES")
        found = jax.eval_shape(part.of_page, tokens, valid)
        if (found.shape, found.dtype) != ((3, 1, 8), jnp.float32):
            raise ValueError(
                f"part {index} of {name} makes {found.dtype}{list(found.shape)} of float32[3, 5, 8], 3 pages "
                "of 5 tokens; it must make float32[3, 1, 8]"
            )
    STATISTICS[statistic.name] = statistic


def statistic_of(statistics: Statistics) -> PageStatistic:
    """The definition of what was given.

    Raises:
      TypeError: it is not `Statistics`.
      ValueError: its kind is unknown, or its arrays are not of that kind.
    """
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"page statistics are a {type(statistics).__name__}; use Statistics(values, kind=...), or the "
            "zeros of one of STATISTICS"
        )
    kind = statistics.kind
    if kind not in STATISTICS:
        raise ValueError(f"statistics {kind!r} are unknown; use one of {', '.join(STATISTICS)}")
    statistic, vectors = STATISTICS[kind], statistics.values.shape[-2]
    if vectors != statistic.vectors:
        raise ValueError(f"{vectors} vectors per page were given; {kind!r} has {statistic.vectors}")
    if (statistics.scales is not None) != statistic.quantized:
        has, needs = ("no", "8-bit values with") if statistic.quantized else ("", "values without")
        raise ValueError(f"statistics with {has or 'some'} scales were given; {kind!r} has {needs} scales")
    return statistic
