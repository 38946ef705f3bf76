"""Quest (arXiv 2406.10774): the newest query attends to the pages that score best for it.

Differences from the original: one page set per KV head under grouped-query attention instead of one per
query head, and optional sink pages.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels import select_pages
from retro_jax.methods.base import Method


def best_pages(
    config,
    layer,
    q: Float[Array, "B N D"],
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The pages that score best for the newest query, within the budget."""
    return select_pages(
        q,
        layer.statistics,
        positions,
        budgets,
        page_size=config.page_size,
        capacity=config.max_selected_pages(layer.statistics.shape[2]),
        score=config.score,
        group_reduce=config.group_reduce,
        sink_pages=config.sink_pages,
        implementation=config.implementation,
    )


QUEST = Method(name="quest", select=best_pages)
