"""Attention of decode queries over pages: dense, sparse and retrospective."""

from pallas_kernels.attention.api import dense_attention, retro_attention
from pallas_kernels.attention.reference import attend, merge

__all__ = ["attend", "dense_attention", "merge", "retro_attention"]
