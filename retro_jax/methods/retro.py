"""RetroAttention (arXiv 2508.09001): Quest's pages, loaded once, also revise the last W-1 queries."""

from retro_jax.methods.base import Method
from retro_jax.methods.quest import best_pages

RETRO = Method(name="retro", select=best_pages, default_window=4, revises=True)
