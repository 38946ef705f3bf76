"""How a page is scored from its statistics: an upper bound or an estimate of its attention logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class PageScore:
    """A page score.

    Attributes:
      statistics: the kind of page statistic that it reads.
      compute: (q[B, K, G, D], statistics[B, K, P, Z, D]) -> scores[B, K, G, P], float32.
    """

    statistics: str
    compute: Callable[[Float[Array, "B K G D"], Float[Array, "B K P Z D"]], Float[Array, "B K G P"]]


def _dot(q: Float[Array, "B K G D"], vectors: Float[Array, "B K P D"]) -> Float[Array, "B K G P"]:
    return jnp.einsum("bkgd,bkpd->bkgp", q, vectors, preferred_element_type=jnp.float32)


def _bounds(q: Float[Array, "B K G D"], statistics: Float[Array, "B K P 2 D"]) -> Float[Array, "B K G P"]:
    """Quest's upper bound: the sum over channels of max(q * kmin, q * kmax)."""
    low, high = statistics[..., 0, :], statistics[..., 1, :]
    return _dot(jnp.maximum(q, 0), high) + _dot(jnp.minimum(q, 0), low)


def _mean_key(q: Float[Array, "B K G D"], statistics: Float[Array, "B K P 1 D"]) -> Float[Array, "B K G P"]:
    """The logit of the page's mean key."""
    return _dot(q, statistics[..., 0, :])


SCORES: Mapping[str, PageScore] = {
    "bounds": PageScore(statistics="min_max", compute=_bounds),
    "mean_key": PageScore(statistics="mean_key", compute=_mean_key),
}
GROUP_REDUCE = {"mean": jnp.mean, "max": jnp.max}
"""How the scores of a group's query heads become one score for their KV head."""
