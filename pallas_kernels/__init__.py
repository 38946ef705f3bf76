"""The operations of a decode step on pages of keys and values.

Each folder is one operation: `api.py` holds the public function, which checks its arguments and
dispatches; `reference.py` its definition in plain `jnp`, which is also the CPU path. The kernels for a kind
of chip lie below them in `gpu/` or `tpu/`, which know nothing of each other, and are right when they equal
the reference; facts about chips are in `gpu.py` and `tpu.py` here. Callers see only the functions below;
nothing here knows of models or decode loops.

Axes: B batch, T tokens, W window slots, N query heads, K KV heads, G = N/K, D head_dim, P pages of the
cache, C selected pages (static capacity), S page_size, Z vectors per page of the statistics.

The cache of one layer is one array, `pages[B, K, P, 2, S, D]`: keys (index 0) and values (1) of a page lie
together, so one copy brings both. In 8 bits it is two arrays, codes and scales (`QuantizedPages`). Layers are
separate: a kernel aliases the whole of its operand and updates it in place, which a slice of a stacked cache
would not allow.
"""

from pallas_kernels import metadata  # noqa: F401  (makes its statistics and scores known)
from pallas_kernels.attention import (
    attend_estimates,
    attend_pages,
    attend_window,
    attention_mass,
    dense_attention,
    merge,
    merge_sinks,
    retro_attention,
    selected_mass,
    settle_blocks,
)
from pallas_kernels.dispatch import IMPLEMENTATIONS, kernels_of_device
from pallas_kernels.experts import mixture_of_experts
from pallas_kernels.layout import KEYS, VALUES, pages_for
from pallas_kernels.pages import (
    CODES,
    Pages,
    QuantizedPages,
    dequantized,
    empty_pages,
    quantize,
    vector_bytes,
)
from pallas_kernels.scores import GROUP_REDUCE, SCORES, PageScore, register_score
from pallas_kernels.selection import choose_pages, page_scores, select_pages
from pallas_kernels.sliding import (
    chunk_attention,
    read_ring,
    restore_ring,
    ring_places,
    update_ring,
    window_attention,
)
from pallas_kernels.statistics import (
    HIGHEST,
    LOWEST,
    MEAN,
    STATISTICS,
    Fold,
    PageStatistic,
    PageVector,
    Statistics,
    register_statistic,
)
from pallas_kernels.sums import Mailbox, add_parts, add_sum, depth_splits, open_mailbox
from pallas_kernels.update import refresh_statistics, update_from_product, update_pages

__all__ = [
    "CODES",
    "GROUP_REDUCE",
    "HIGHEST",
    "IMPLEMENTATIONS",
    "KEYS",
    "LOWEST",
    "MEAN",
    "SCORES",
    "STATISTICS",
    "VALUES",
    "Fold",
    "Mailbox",
    "PageScore",
    "PageStatistic",
    "PageVector",
    "Pages",
    "QuantizedPages",
    "Statistics",
    "add_parts",
    "add_sum",
    "attend_estimates",
    "attend_pages",
    "attend_window",
    "attention_mass",
    "choose_pages",
    "chunk_attention",
    "dense_attention",
    "depth_splits",
    "dequantized",
    "empty_pages",
    "kernels_of_device",
    "merge",
    "merge_sinks",
    "mixture_of_experts",
    "open_mailbox",
    "page_scores",
    "pages_for",
    "quantize",
    "read_ring",
    "refresh_statistics",
    "register_score",
    "register_statistic",
    "restore_ring",
    "retro_attention",
    "ring_places",
    "select_pages",
    "selected_mass",
    "settle_blocks",
    "update_from_product",
    "update_pages",
    "update_ring",
    "vector_bytes",
    "window_attention",
]
