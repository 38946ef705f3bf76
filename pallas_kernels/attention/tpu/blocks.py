"""How the TPU kernels of attention cut their work, by rule from shapes and chip; the memory it takes."""

from dataclasses import dataclass

from pallas_kernels.tpu import LANES, SUBLANES, Chip

LATENCY = 2e-6  # of a copy from HBM, in seconds: what is under way must cover it
_BLOCK_TOKENS = 1024
ROWS = 3
"""Items whose page ids and last_loaded are in scalar memory: one arrives, one is in use, one leaves."""


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      pages: pages of one block; their tokens are a multiple of 128.
      ahead: how many blocks are under way while one is attended to.
    """

    pages: int
    ahead: int


def page_bytes(page_size: int, head_dim: int, itemsize: int) -> int:
    """Keys and values of a page. Rows take whole tiles of 128 lanes, in HBM too: 64 as much as 128."""
    return 2 * page_size * -(-head_dim // LANES) * LANES * itemsize


def choose_blocks(chip: Chip, page_size: int, head_dim: int, itemsize: int, capacity: int) -> Blocks:
    """Blocks of 1024 tokens, or of the capacity; as many as cover the latency of HBM, and fit VMEM."""
    least = max(LANES // page_size, 1)
    pages = max(min(_BLOCK_TOKENS // page_size, -(-capacity // least) * least), least)
    size = pages * page_bytes(page_size, head_dim, itemsize)
    needed = min(chip.bandwidth * LATENCY, chip.vmem // 2)
    return Blocks(pages, max(min(int(needed // size) + 1, -(-capacity // pages)), 1))


def vmem_bytes(blocks: Blocks, page_size: int, head_dim: int, itemsize: int, rows: int, cached: bool) -> int:
    """Blocks of pages, their horizons, and double-buffered rows of queries, outputs and log-sum-exps."""
    slots = blocks.ahead + 1
    pages = slots * blocks.pages * page_bytes(page_size, head_dim, itemsize)
    horizons = slots * SUBLANES * blocks.pages * page_size * 4
    lanes = -(-head_dim // LANES) * LANES
    outputs = (2 if cached else 1) * rows * (lanes + LANES) * 4
    return pages + horizons + 2 * (rows * lanes * itemsize + outputs)


def smem_bytes(blocks: Blocks, B: int, W: int, K: int, P: int, capacity: int | None) -> int:
    """Positions and counts of all sequences; with a selection, page ids and last_loaded of some items."""
    scalars = B * (_whole(W) + _whole(K)) + LANES
    rows = 0 if capacity is None else ROWS * sum(row_sizes(blocks, capacity, P))
    return 4 * (scalars + rows)


def row_sizes(blocks: Blocks, capacity: int, P: int) -> tuple[int, int]:
    """Entries of an item's page ids, with room for two blocks beyond, and of its row of last_loaded."""
    return _whole(capacity + 2 * blocks.pages), _whole(P + 1)


def _whole(entries: int) -> int:
    return -(-entries // LANES) * LANES
