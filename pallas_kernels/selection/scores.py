"""How a page is scored from its statistics: an upper bound or an estimate of its attention logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.operation import check_supported
from pallas_kernels.statistics import Quantized, Statistics


@dataclass(frozen=True)
class PageScore:
    """A page score: a weighted sum over the page's statistics whose weights depend on the query.

    Attributes:
      statistics: the kinds of page statistic that it can read.
      coefficients: the weights for each of the Z vectors of the statistics, q[..., D] -> Z arrays like q.
    """

    statistics: tuple[str, ...]
    coefficients: Callable[[Float[Array, "... D"]], Sequence[Float[Array, "... D"]]]

    def compute(self, q: Float[Array, "B K G D"], statistics: Statistics) -> Float[Array, "B K G P"]:
        """Scores of every page for every query head, float32."""
        weights = jnp.stack(self.coefficients(q), axis=-2)
        if isinstance(statistics, Quantized):
            statistics = statistics.at_float32()
        return jnp.einsum("bkgzd,bkpzd->bkgp", weights, statistics, preferred_element_type=jnp.float32)


def _bounds(q: Float[Array, "... D"]) -> Sequence[Float[Array, "... D"]]:
    """Quest's upper bound, the sum over channels of max(q * kmin, q * kmax)."""
    return [jnp.minimum(q, 0), jnp.maximum(q, 0)]


def _mean_key(q: Float[Array, "... D"]) -> Sequence[Float[Array, "... D"]]:
    """The logit of the page's mean key."""
    return [q]


SCORES: Mapping[str, PageScore] = {
    "bounds": PageScore(statistics=("min_max",), coefficients=_bounds),
    "mean_key": PageScore(statistics=("mean_key", "mean_key_int8"), coefficients=_mean_key),
}
GROUP_REDUCE = {"mean": jnp.mean, "max": jnp.max, "mass": jnp.mean}
"""How the scores of a group's query heads become one score for their KV head. Before "mass" takes the mean,
each head's scores become attention weights, see `attention_weights`."""


def check_kernel(kernel: str, statistics: Statistics, group_reduce: str) -> None:
    """Raises `NotImplementedError` for what no kernel selects by."""
    kind = "8-bit" if isinstance(statistics, Quantized) else "full precision"
    check_supported(
        kernel,
        statistics=(kind, ("full precision",)),
        group_reduce=(group_reduce, ("mean", "max")),
    )


def attention_weights(
    scores: Float[Array, "B K G P"], before: Bool[Array, " B #K #G P"], head_dim: int
) -> Float[Array, "B K G P"]:
    """Each query head's softmax of its scores, taken as logits of whole pages, over the pages in `before`.

    Heads so count by what they attend to, not by the length of their queries. Other pages get 0.
    """
    logits = jnp.where(before, scores * head_dim**-0.5, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)
