"""How a page is scored from its statistics: an upper bound or an estimate of its attention logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class PageScore:
    """A page score: a weighted sum over the page's statistics whose weights depend on the query.

    Attributes:
      statistics: the kind of page statistic that it reads.
      coefficients: the weights for each of the Z vectors of the statistics, q[..., D] -> Z arrays like q.
    """

    statistics: str
    coefficients: Callable[[Float[Array, "... D"]], Sequence[Float[Array, "... D"]]]

    def compute(
        self, q: Float[Array, "B K G D"], statistics: Float[Array, "B K P Z D"]
    ) -> Float[Array, "B K G P"]:
        """Scores of every page for every query head, float32."""
        weights = jnp.stack(self.coefficients(q), axis=-2)
        return jnp.einsum("bkgzd,bkpzd->bkgp", weights, statistics, preferred_element_type=jnp.float32)


def _bounds(q: Float[Array, "... D"]) -> Sequence[Float[Array, "... D"]]:
    """Quest's upper bound, the sum over channels of max(q * kmin, q * kmax)."""
    return [jnp.minimum(q, 0), jnp.maximum(q, 0)]


def _mean_key(q: Float[Array, "... D"]) -> Sequence[Float[Array, "... D"]]:
    """The logit of the page's mean key."""
    return [q]


SCORES: Mapping[str, PageScore] = {
    "bounds": PageScore(statistics="min_max", coefficients=_bounds),
    "mean_key": PageScore(statistics="mean_key", coefficients=_mean_key),
}
GROUP_REDUCE = {"mean": jnp.mean, "max": jnp.max}
"""How the scores of a group's query heads become one score for their KV head."""
