"""Page selection on Hopper GPUs, in two launches: scores on the matrix unit, then the choice by a threshold.

Scores must be linear in a page's statistics. Where the heads of a group are reduced by "mass", the first
launch writes each head's logits beside partial sums of their powers, and the second makes shares of attention
of them before it chooses.
"""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import HEAD_DIMS, SHARED_MEMORY, TILE_ROWS, check_support
from pallas_kernels.operation import check_supported, operation
from pallas_kernels.scores import check_linear
from pallas_kernels.selection.gpu.choice import CHUNK, choose_pages
from pallas_kernels.selection.gpu.scoring import score_pages, stages
from pallas_kernels.statistics import Statistics

CHANNELS = (16, 32)
"""Of vectors in 8 bits that are no mean keys but fewer numbers."""
MAX_HEADS_OF_SHARES = 32
"""Query heads of a group whose logits of a tile fit the registers together."""


@operation
def select_pages(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    score: str,
    group_reduce: str,
    sink_pages: int,
    parts: int | None = None,
    interpret: Any = None,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """See `pallas_kernels.selection.api.select_pages`."""
    check_linear("Mosaic GPU", score)
    K, P, Z, D = statistics.values.shape[1:]
    eight = statistics.scales is not None
    dims = (*CHANNELS, *HEAD_DIMS) if eight else HEAD_DIMS
    check_support(q.dtype if eight else statistics.values.dtype, D, page_size, dims)
    if eight:
        check_supported("Mosaic GPU", vectors_in_8_bits=(Z, (1,)))
    if P % 8:
        raise NotImplementedError(
            f"select_pages: {P} pages are not a multiple of 8, as the Mosaic GPU kernel needs"
        )
    tiles = -(-P // TILE_ROWS)
    tiles = -(-tiles // 8) * 8 if tiles <= CHUNK else -(-tiles // CHUNK) * CHUNK
    if tiles * TILE_ROWS * 4 > SHARED_MEMORY - 8192:
        raise NotImplementedError(
            f"select_pages: scores of {P} pages do not fit the shared memory of the Mosaic GPU kernel "
            f"({SHARED_MEMORY} bytes)"
        )
    group = q.shape[1] // K
    if group_reduce == "mass" and group > MAX_HEADS_OF_SHARES:
        raise NotImplementedError(
            f"select_pages: shares of attention of {group} heads of a group are more than the Mosaic GPU "
            f"kernel's {MAX_HEADS_OF_SHARES}"
        )
    if stages(group, statistics, q.dtype.itemsize) < 1:
        raise NotImplementedError(
            f"select_pages: {Z} vectors of head_dim {D} for {group} heads of a group do not fit the shared "
            f"memory of the Mosaic GPU kernel ({SHARED_MEMORY} bytes)"
        )
    scored = score_pages(
        q,
        statistics,
        positions,
        page_size=page_size,
        tiles=tiles,
        score=score,
        group_reduce=group_reduce,
        sink_pages=sink_pages,
        interpret=interpret,
    )
    return choose_pages(
        scored,
        positions,
        budgets,
        page_size=page_size,
        capacity=capacity,
        sink_pages=sink_pages,
        parts=parts or max(1, min(tiles // 8, 8)),
        interpret=interpret,
    )
