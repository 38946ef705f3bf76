"""How many pages a step may load, what a method is told of that, and what a step reads.

What is read is counted in vectors: head_dim channels of a key or value in the model's dtype, of one KV head.
In a cache of 8 bits one counts as the part of that which its codes and its scale take.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import STATISTICS, vector_bytes
from pallas_kernels.dispatch import SEQUENCES
from retro_jax.cache import spread
from retro_jax.config import DecodeConfig
from retro_jax.rules import Rules
from retro_jax.selectors import LEARNED

QUEST_PAGE, QUEST_VECTORS = 16, 2
"""Quest's page size, and the vectors that it reads of every page to score it."""


@flax.struct.dataclass
class Budget:
    """What each sequence may load: max(share of the context, floor) tokens per layer and KV head.

    A run-time value: the sequences of a batch may have different ones, none above the configuration's.

    Attributes:
      share: of the context, the newest token included.
      floor: tokens.
    """

    share: Float[Array, " B"] = spread(SEQUENCES)
    floor: Int[Array, " B"] = spread(SEQUENCES)

    @classmethod
    def of_each(cls, configs: Sequence[DecodeConfig]) -> "Budget":
        """That of each sequence's own configuration."""
        parts = [cls.of(config, 1) for config in configs]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)

    @classmethod
    def of(cls, config: DecodeConfig, batch: int) -> "Budget":
        """The configuration's, for every sequence."""
        share = config.budget if config.budget_tokens is None else 0.0
        return cls(
            share=jnp.full(batch, share, jnp.float32),
            floor=jnp.full(batch, config.least_tokens, jnp.int32),
        )


def budget_pages(
    config: DecodeConfig, budget: Budget, context: Int[Array, " B"], head_dim: int, itemsize: int
) -> Int[Array, " B"]:
    """Pages that a step may load in a sparse layer.

    Args:
      config: how to decode.
      budget: of each sequence.
      context: tokens of each sequence, the newest included.
      head_dim: channels of a key.
      itemsize: bytes of a channel in the model's dtype.
    """
    return _pages(config, budget.share, budget.floor, context, head_dim, itemsize, jnp)


@functools.cache
def most_pages(config: DecodeConfig, num_pages: int, head_dim: int, itemsize: int) -> int:
    """C, the static number of places for selected pages in a cache of `num_pages` pages."""
    if config.eviction and config.eviction.grows:
        return num_pages
    share = np.float32(config.budget if config.budget_tokens is None else 0.0)
    context = np.arange(1, num_pages * config.page_size + 1, dtype=np.int32)
    pages = _pages(config, share, np.int32(config.least_tokens), context, head_dim, itemsize, np)
    return min(int(pages.max()) + 1, num_pages)  # one more, whichever way float32 rounds a share


def largest(configs: Sequence[DecodeConfig], num_pages: int, head_dim: int, itemsize: int) -> DecodeConfig:
    """Of configurations that differ in their budgets only, the one that may load the most pages.

    Raises:
      ValueError: they differ in something else.
    """
    first = configs[0]
    budgets = {name: getattr(first, name) for name in ("budget", "budget_floor", "budget_tokens")}
    for config in configs:
        if replace(config, **budgets) != first:
            raise ValueError(
                f"{config} and {first} were given; those of one batch may differ in their budgets only"
            )
    return max(configs, key=lambda config: most_pages(config, num_pages, head_dim, itemsize))


def rules_of(config: DecodeConfig, num_pages: int, head_dim: int, itemsize: int) -> Rules:
    """What the configuration's method is told in a cache of `num_pages` pages."""
    places, left = most_pages(config, num_pages, head_dim, itemsize), config.left_pages
    return Rules(
        page_size=config.page_size,
        sink_pages=config.sink_pages,
        places=places,
        left_places=places if left is None else min(left, num_pages),
        left_pages=left,
        score=config.score,
        score_seed=config.score_seed,
        group_reduce=config.group_reduce,
        observation=config.observation,
        implementation=config.implementation,
    )


def cached_vector(config: DecodeConfig, head_dim: int, itemsize: int) -> float:
    """What a key or value of the cache takes, in vectors."""
    if config.cache_dtype is None:
        return 1.0
    return vector_bytes(head_dim, config.cache_dtype) / (head_dim * itemsize)


def statistics_width(config: DecodeConfig, head_dim: int) -> int:
    """Channels of each vector of the page statistics that the configuration keeps."""
    return config.score_channels if config.score == LEARNED else head_dim


def vectors_per_page(config: DecodeConfig, head_dim: int, itemsize: int) -> float:
    """Vectors that a step reads of every page, loaded or not, to score and to estimate it."""
    vectors = config.scored_vectors * cached_vector(config, head_dim, itemsize)
    if config.kept_statistics:
        kind = STATISTICS[config.kept_statistics]
        width = statistics_width(config, head_dim)
        vectors += kind.vectors * kind.vector_bytes(width, itemsize) / (head_dim * itemsize)
    return vectors + (1 / config.residual_pages if config.residual_pages else 0.0)


def _pages(config, share, floor, context, head_dim, itemsize, numpy):
    """`budget_pages` by either `numpy`."""
    tokens = numpy.maximum(numpy.round(share * context.astype(numpy.float32)).astype(numpy.int32), floor)
    if config.budget_covers == "pages":
        return -(-tokens // config.page_size)
    # Rounded up to whole pages, as everywhere.
    quest = QUEST_VECTORS * -(-context // QUEST_PAGE) + 2 * QUEST_PAGE * -(-tokens // QUEST_PAGE)
    own = vectors_per_page(config, head_dim, itemsize) * -(-context // config.page_size)
    cached = cached_vector(config, head_dim, itemsize)
    own += cached * (config.residual_pages > 0)  # of a block that settles, a value a step
    pages = numpy.floor((quest - own) / (2 * config.page_size * cached)).astype(numpy.int32)
    return numpy.maximum(pages, 1 + config.sink_pages)
