"""Page selection in plain `jnp`: the definition, and the path on the CPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.scores import GROUP_REDUCE, SCORES, attention_weights
from pallas_kernels.statistics import Statistics


def select_pages(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    score: str,
    group_reduce: str,
    sink_pages: int,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """See `pallas_kernels.selection.api.select_pages`."""
    return choose_pages(
        page_scores(q, statistics, positions, page_size=page_size, score=score, group_reduce=group_reduce),
        positions,
        budgets,
        page_size=page_size,
        capacity=capacity,
        sink_pages=sink_pages,
    )


def page_scores(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    *,
    page_size: int,
    score: str,
    group_reduce: str,
) -> Float[Array, "B K P"]:
    """See `pallas_kernels.selection.api.page_scores`."""
    B, N, D = q.shape
    K, P = statistics.values.shape[1:3]
    scores = SCORES[score].compute(q.reshape(B, K, N // K, D), statistics)
    if group_reduce == "mass":
        before = jnp.arange(P) < (positions // page_size)[:, None, None, None]
        scores = attention_weights(scores, before, D)
    return GROUP_REDUCE[group_reduce](scores, axis=2)


def choose_pages(
    scores: Float[Array, "B K P"],
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    sink_pages: int,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """See `pallas_kernels.selection.api.choose_pages`."""
    page, newest = jnp.arange(scores.shape[2]), (positions // page_size)[:, None, None]
    scores = jnp.where((page == newest) | (page < sink_pages), jnp.inf, scores)
    scores = jnp.where(page <= newest, scores, -jnp.inf)
    _, page_ids = lax.top_k(scores, capacity)  # ties to the lower page; forced pages first
    counts = jnp.minimum(budgets[:, None], jnp.sum(scores != -jnp.inf, axis=2))
    return page_ids, counts
