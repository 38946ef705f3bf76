"""Attention of decode queries over pages: dense, sparse and retrospective."""

from pallas_kernels.attention.api import dense_attention, retro_attention
from pallas_kernels.attention.mass import attention_mass, selected_mass
from pallas_kernels.attention.reference import attend, attend_pages, merge
from pallas_kernels.attention.residual import attend_estimates, settle_blocks

__all__ = [
    "attend",
    "attend_estimates",
    "attend_pages",
    "attention_mass",
    "dense_attention",
    "merge",
    "retro_attention",
    "selected_mass",
    "settle_blocks",
]
