"""Sliding-window attention over a ring of pages, which holds the latest tokens only.

The key and value of position p lie at place p mod `ring`, over those of p - `ring`; places are numbered
through all pages. A ring of as many places as the window has tokens serves one query at a time, which sees
all that is there. More queries, or tokens that are passed over again, need as many places more.
"""

from pallas_kernels.sliding.api import (
    chunk_attention,
    read_ring,
    restore_ring,
    ring_places,
    update_ring,
    window_attention,
)

__all__ = [
    "chunk_attention",
    "read_ring",
    "restore_ring",
    "ring_places",
    "update_ring",
    "window_attention",
]
