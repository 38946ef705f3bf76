"""Quest (arXiv 2406.10774): the newest query attends to the pages that score best for it.

Differences from the original: one page set per KV head under grouped-query attention instead of one per
query head, optional sink pages, other scores to choose from, and optionally an eviction rule, which leaves
fewer pages to select from.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import select_pages
from retro_jax.cache import LayerState
from retro_jax.methods.base import Method
from retro_jax.rules import Query, Rules
from retro_jax.selectors import SELECTORS


def best_pages(
    rules: Rules, layer: LayerState, query: Query, left: Bool[Array, "B K P"] | None
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The pages that score best for the newest query, within the budget, among those that are left."""
    selector = SELECTORS[rules.score]
    if left is None and selector.by:
        return select_pages(
            query.scored,
            layer.statistics,
            query.positions,
            query.budgets,
            score=selector.by,
            group_reduce=rules.group_reduce,
            implementation=rules.implementation,
            page_size=rules.page_size,
            capacity=rules.places,
            sink_pages=rules.sink_pages,
        )
    left = jnp.ones(layer.pages.shape[:3], bool) if left is None else left
    scores = selector.scores(rules, layer, query, left)
    return rules.choose(jnp.where(left, scores, -jnp.inf), query)


QUEST = Method(
    name="quest",
    title="Quest",
    help="the pages that score best for the newest query",
    select=best_pages,
    scored=True,
)
