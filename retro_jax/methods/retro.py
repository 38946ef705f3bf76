"""RetroAttention (arXiv 2508.09001): Quest's pages, loaded once, also revise the last W-1 queries.

With an eviction rule, a past query can still be revised by the pages that are left; what it has merged from a
page that is gone stays in its output.
"""

from retro_jax.methods.base import Method
from retro_jax.methods.quest import best_pages

RETRO = Method(
    name="retro",
    title="Retro",
    help="Quest, and every loaded page also revises the last queries",
    select=best_pages,
    scored=True,
    default_window=4,
    revises=True,
)
