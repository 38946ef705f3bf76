"""How a page is scored from its statistics: an upper bound or an estimate of its attention logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.operation import check_registered, check_supported
from pallas_kernels.settings import under_fixed_settings
from pallas_kernels.statistics import STATISTICS, Statistics


@dataclass(frozen=True)
class PageScore:
    """A page score, by `coefficients` if it is a weighted sum over the page's vectors, else by `function`.

    Attributes:
      name: what it is asked for by.
      statistics: the kinds of page statistic that it can read.
      coefficients: the weights for each of the Z vectors of the statistics, q[..., D] -> Z arrays like q.
        Kernels take such scores only.
      function: (q[..., G, D], vectors[..., P, Z, D]) -> scores[..., G, P].
    """

    name: str
    statistics: tuple[str, ...]
    coefficients: Callable[[Float[Array, "... D"]], Sequence[Float[Array, "... D"]]] | None = None
    function: Callable[[Array, Array], Array] | None = None

    def compute(self, q: Float[Array, "B K G D"], statistics: Statistics) -> Float[Array, "B K G P"]:
        """Scores of every page for every query head, float32."""
        vectors = statistics.at_float32()
        if self.coefficients is None:
            return self.function(q, vectors)
        weights = jnp.stack(self.coefficients(q), axis=-2)
        return jnp.einsum("bkgzd,bkpzd->bkgp", weights, vectors, preferred_element_type=jnp.float32)


SCORES: Mapping[str, PageScore] = {}
"""By name; filled by `register_score`."""
GROUP_REDUCE = {"mean": jnp.mean, "max": jnp.max, "mass": jnp.mean}
"""How the scores of a group's query heads become one score for their KV head. Before "mass" takes the mean,
each head's scores become attention weights, see `attention_weights`."""


@under_fixed_settings
def register_score(score: PageScore) -> None:
    """Makes a score of pages known by its name, here and to `DecodeConfig`.

    A statistic of three vectors, and a score of the page's bound or of twice its mean key's logit:

        import jax.numpy as jnp
        import retro_jax as rj
        from pallas_kernels import HIGHEST, LOWEST, MEAN, PageScore, PageStatistic, PageVector

        def bound_or_mean(q, vectors):
            low, high, mean = jnp.moveaxis(vectors, -2, 0)
            def dot(q, keys):
                return jnp.einsum("...gd,...pd->...gp", q, keys)
            bound = dot(jnp.minimum(q, 0), low) + dot(jnp.maximum(q, 0), high)
            return jnp.maximum(bound, 2 * dot(q, mean))

        parts = PageVector(LOWEST), PageVector(HIGHEST), PageVector(MEAN)
        rj.register_statistic(PageStatistic("bounds_mean", parts))
        rj.register_score(PageScore("bound_or_mean", ("bounds_mean",), function=bound_or_mean))
        config = rj.DecodeConfig(score="bound_or_mean", budget_tokens=128)

    A name means its score for the rest of the process, as compiled programs are told apart by it. Of several
    processes that share a mesh, each registers it. A test that is to leave nothing behind registers within
    `unittest.mock.patch.dict` of `SCORES` and `STATISTICS`, under names of its own.

    Args:
      score: whose name is `DecodeConfig.score` from now on.

    Raises:
      ValueError: the name is taken; it reads no statistic or an unknown one; it has not just one of
        `coefficients` and `function`, or that one makes arrays of other shapes or dtypes.
    """
    name = f"score {score.name!r}"
    check_registered(name, score.name, SCORES)
    unknown = [kind for kind in score.statistics if kind not in STATISTICS]
    if unknown or not score.statistics:
        what = f"unknown statistics {unknown[0]!r}" if unknown else "no statistics"
        raise ValueError(f"{name} reads {what}; use some of {', '.join(STATISTICS)}")
    if (score.coefficients is None) == (score.function is None):
        raise ValueError(f"{name} has both or neither of coefficients and function; give one of them")
    q = jax.ShapeDtypeStruct((1, 2, 3, 8), jnp.float32)
    for kind in score.statistics:
        Z = STATISTICS[kind].vectors
        if score.coefficients is not None:
            found = [(x.shape, x.dtype.name) for x in jax.eval_shape(score.coefficients, q)]
            wanted = [((1, 2, 3, 8), "float32")] * Z
        else:
            x = jax.eval_shape(score.function, q, jax.ShapeDtypeStruct((1, 2, 5, Z, 8), jnp.float32))
            found, wanted = (x.shape, x.dtype.name), ((1, 2, 3, 5), "float32")
        if found != wanted:
            raise ValueError(f"{name} makes {found} of q[1, 2, 3, 8] and 5 pages of {kind!r}; needs {wanted}")
    SCORES[score.name] = score


def check_linear(kernel: str, score: str) -> None:
    """Raises `NotImplementedError` for a score by which no kernel selects."""
    linear = tuple(name for name, known in SCORES.items() if known.coefficients is not None)
    check_supported(kernel, score=(score, linear))


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
