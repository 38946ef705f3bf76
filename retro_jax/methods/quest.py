"""Quest (arXiv 2406.10774): the newest query attends to the pages that score best for it.

Differences from the original: one page set per KV head under grouped-query attention instead of one per
query head, optional sink pages, other scores to choose from, and optionally an eviction rule, which leaves
fewer pages to select from.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import SCORES, choose_pages, select_pages
from retro_jax.budget import most_pages
from retro_jax.methods.base import Method, Query
from retro_jax.methods.eviction import Kept, evict, remember
from retro_jax.selectors import SELECTORS


def best_pages(config, layer, query: Query) -> tuple[Int[Array, "B K C"], Int[Array, "B K"], Kept | None]:
    """The pages that score best for the newest query, within the budget, among those that are left."""
    _, _, P, _, _, D = layer.pages.shape
    places = {
        "page_size": config.page_size,
        "capacity": most_pages(config, P, D, layer.pages.dtype.itemsize),
        "sink_pages": config.sink_pages,
    }
    if layer.kept is None and config.score in SCORES:
        page_ids, counts = select_pages(
            query.q,
            layer.statistics,
            query.positions,
            query.budgets,
            score=config.score,
            group_reduce=config.group_reduce,
            implementation=config.implementation,
            **places,
        )
        return page_ids, counts, None

    kept, alive = layer.kept, jnp.ones(layer.pages.shape[:3], bool)
    if kept is not None:
        kept, _, _ = evict(config, kept, query)
        alive = kept.alive
    scores = jnp.where(alive, SELECTORS[config.score].scores(config, layer, query, alive), -jnp.inf)
    page_ids, counts = choose_pages(
        scores, query.positions, query.budgets, implementation=config.implementation, **places
    )
    if kept is not None:
        kept = remember(config, layer, kept, query, page_ids, counts)
    return page_ids, counts, kept


QUEST = Method(name="quest", select=best_pages, scored=True)
