"""Quest's metadata (arXiv 2406.10774, section 3.3): the bounds of a page's keys, channel by channel."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.scores import PageScore
from pallas_kernels.statistics import HIGHEST, LOWEST, PageStatistic, PageVector

STATISTICS = (PageStatistic("min_max", (PageVector(LOWEST), PageVector(HIGHEST))),)


def _bounds(q: Float[Array, "... D"]) -> Sequence[Float[Array, "... D"]]:
    """Quest's upper bound, the sum over channels of max(q * kmin, q * kmax)."""
    return [jnp.minimum(q, 0), jnp.maximum(q, 0)]


SCORE = PageScore("bounds", ("min_max",), _bounds)
