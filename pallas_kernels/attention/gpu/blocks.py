"""How the Hopper kernels of attention cut their work: by rule, or as measured for a chip (`tuned.json`).

`experiments/bench/tune_kernels.py` measures and writes that file.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Array, Float

from pallas_kernels.gpu import SHARED_MEMORY, TILE_ROWS, chip, num_multiprocessors
from pallas_kernels.pages import Pages

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      pages: pages of one stage; their tokens are a multiple of 32, in 8 bits of 64.
      stages: how many of them are in flight.
      splits: blocks of threads that share the pages of one sequence and KV head.
      warpgroups: of 128 threads that compute; they take turns, so `stages` is a multiple of it.
    """

    pages: int
    stages: int
    splits: int
    warpgroups: int = 2


def stage_bytes(pages: int, page_size: int, head_dim: int, itemsize: int = 2) -> int:
    """Shared memory of one stage; in 8 bits with its scales."""
    return pages * 2 * page_size * (head_dim * itemsize + (4 if itemsize == 1 else 0))


def free_bytes(head_dim: int, converted: int = 0) -> int:
    """Shared memory that is left for stages beside queries (twice), outputs and small things.

    Args:
      head_dim: D.
      converted: tokens of 8 bits whose keys and values are converted at a time, by all warpgroups.
    """
    return SHARED_MEMORY - TILE_ROWS * head_dim * (2 + 2 + 4) - converted * 2 * head_dim * 2 - 4096


Cut = tuple[int, int, int, int]
"""Pages of a stage, stages, computing warpgroups, and blocks of threads for each multiprocessor."""


def choose_blocks(
    q: Float[Array, "B W N D"],
    pages: Pages,
    capacity: int,
    cut: Cut | None = None,
) -> Blocks:
    """A cut of the work for these shapes; None: what is known to be fast for the nearest, else what fits."""
    B, K, P, _, S, D = pages.shape
    rows, itemsize = q.shape[1] * q.shape[2] // K, pages.dtype.itemsize
    cut = cut or _nearest(chip(), D, S, itemsize, rows, B * K * capacity) or _fitting(D, S, itemsize)
    stage_pages, stages, warpgroups, waves = cut
    whole = max(tile_tokens(itemsize) // S, 1)
    stage_pages = max(min(stage_pages, P // whole * whole), whole)
    splits = max(1, min(num_multiprocessors() * waves // (B * K), -(-capacity // stage_pages)))
    return Blocks(stage_pages, stages, splits, warpgroups)


def tile_tokens(itemsize: int) -> int:
    """Tokens whose keys and values, or in 8 bits whose values, are the rows of a matrix tile."""
    return TILE_ROWS if itemsize == 1 else TILE_ROWS // 2


def _fitting(head_dim: int, page_size: int, itemsize: int) -> Cut:
    """Stages of 64 tokens; of 32 where wide heads and logits of small pages would not fit the registers."""
    warpgroups = 1 if head_dim == 256 else 2
    tokens = 32 if head_dim == 256 and page_size < 32 else 64
    pages = max(tokens // page_size, 1)
    free = free_bytes(head_dim, pages * page_size * warpgroups if itemsize == 1 else 0)
    stages = free // stage_bytes(pages, page_size, head_dim, itemsize)
    stages = min(stages, 8, max(32 // pages, warpgroups))  # the loading warps hold the ids of all stages
    return pages, max(stages // warpgroups * warpgroups, 1), warpgroups, 1


@functools.cache
def _entries() -> list[dict]:
    return json.loads(TUNED.read_text())["entries"] if TUNED.exists() else []


def _nearest(chip: str, head_dim: int, page_size: int, itemsize: int, rows: int, pages: int) -> Cut | None:
    """The tuned sizes of the entry whose rows and pages in all are nearest, by ratio."""
    candidates = [
        entry
        for entry in _entries()
        if (entry["chip"], entry["head_dim"], entry["page_size"]) == (chip, head_dim, page_size)
        and entry.get("itemsize", 2) == itemsize
    ]
    if not candidates:
        return None

    def distance(entry):
        return abs(math.log(entry["rows"] / rows)) + abs(math.log(entry["pages"] / pages))

    best = min(candidates, key=distance)["blocks"]
    return best["pages"], best["stages"], best["warpgroups"], best["waves"]
