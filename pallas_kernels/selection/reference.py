"""Page selection in plain `jnp`: the definition, and the path on the CPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.selection.scores import GROUP_REDUCE, SCORES


def select_pages(
    q: Float[Array, "B N D"],
    statistics: Float[Array, "B K P Z D"],
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
    B, N, D = q.shape
    K, P = statistics.shape[1:3]
    scores = SCORES[score].compute(q.reshape(B, K, N // K, D), statistics)
    scores = GROUP_REDUCE[group_reduce](scores, axis=2)

    page, newest = jnp.arange(P), (positions // page_size)[:, None, None]
    scores = jnp.where((page == newest) | (page < sink_pages), jnp.inf, scores)
    scores = jnp.where(page <= newest, scores, -jnp.inf)
    _, page_ids = lax.top_k(scores, capacity)  # ties to the lower page; forced pages first
    counts = jnp.minimum(budgets[:, None], newest[:, :, 0] + 1)
    return page_ids, jnp.broadcast_to(counts, (B, K))
