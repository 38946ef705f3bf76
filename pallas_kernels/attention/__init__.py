"""Attention of decode queries over pages: dense, sparse and retrospective."""

from pallas_kernels.attention.api import (
    attend_estimates,
    attend_pages,
    attend_window,
    attention_mass,
    dense_attention,
    retro_attention,
    selected_mass,
    settle_blocks,
)
from pallas_kernels.attention.reference import attend, merge, merge_sinks

__all__ = [
    "attend",
    "attend_estimates",
    "attend_pages",
    "attend_window",
    "attention_mass",
    "dense_attention",
    "merge",
    "merge_sinks",
    "retro_attention",
    "selected_mass",
    "settle_blocks",
]
