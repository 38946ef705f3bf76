"""Measures how attention is best cut on this chip, for `pallas_kernels/attention/gpu/tuned.json`.

    python -m retro_jax.experiments.bench.tune_kernels --out tuned.json

Every candidate that fits is timed on every case; the fastest of each dtype of pages, head_dim, page size and
case is kept. Codes of either kind are cut alike.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro

from pallas_kernels import kernels_of_device
from pallas_kernels.attention.gpu import blocks, kernels
from pallas_kernels.gpu import TILE_ROWS, chip
from retro_jax.experiments.bench.device_time import device_time
from retro_jax.experiments.bench.kernel_cases import (
    Case,
    Dimensions,
    attention_calls,
    device_memory,
    parse_case,
    sets_for,
)
from retro_jax.experiments.io.files import write_json
from retro_jax.experiments.io.folders import check_new
from retro_jax.experiments.io.provenance import provenance


@dataclass(kw_only=True)
class Tune:
    """Tune the attention kernel on this chip."""

    out: Path
    """JSON file; it must not exist."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Channels of a head."""
    page_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Tokens of a page."""
    cache_dtypes: tuple[Literal["bfloat16", "int8"], ...] = ("bfloat16", "int8")
    """Of keys and values in pages."""
    cases: tuple[str, ...] = ("1x32768@0.125", "8x32768@0.125")
    """Batch, context and share of the pages that are read."""
    window: int = 4
    """Slots."""
    calls: int = 20
    """Timed calls of each candidate."""

    def run(self) -> None:
        """Times all candidates, telling each on stderr, and writes the best."""
        check_new(self.out)
        if kernels_of_device() != "mosaic_gpu":
            raise ValueError("there is no Hopper GPU here, whose kernels this tunes")
        entries = []
        sizes = itertools.product(self.cache_dtypes, self.head_dims, self.page_sizes, self.cases)
        for dtype, dim, page_size, text in sizes:
            batch, context, share = parse_case(text, shared=True)
            case = Case("attention", batch, context, share=share, window=self.window)
            dims = Dimensions(8, 4, head_dim=dim, page_size=page_size, dtype="bfloat16", cache_dtype=dtype)
            cuts = candidates(dim, page_size, jnp.dtype(dtype).itemsize)
            if not cuts:  # no kernel
                continue
            times = [(self._time(case, dims, cut), cut) for cut in cuts]
            microseconds, best = min(times, key=lambda pair: pair[0])
            entry = _entry(case, dims, best)
            entries.append(entry | {"us": microseconds})
            print(
                f"{dtype} {dim} {page_size} {text}: {best} {microseconds:.1f} us", file=sys.stderr, flush=True
            )
        write_json(self.out, {"entries": entries, "provenance": provenance()})

    def _time(self, case: Case, dims: Dimensions, cut: blocks.Cut) -> float:
        def attend(q, pages, page_ids, *rest):
            sizes = blocks.choose_blocks(q, pages, page_ids.shape[-1], cut)
            return kernels.retro_attention(q, pages, page_ids, *rest, blocks=sizes)

        sets = sets_for(case.rotated(dims), case.footprint(dims), self.calls + 3, device_memory())
        call = attention_calls(case, dims, attend, sets, self.calls + 3, seed=0)
        return device_time(call, self.calls, warm_up=3).busy_us


def candidates(head_dim: int, page_size: int, itemsize: int) -> list[blocks.Cut]:
    """Returns pages of a stage, stages, computing warpgroups and waves that fit the shared memory.

    Args:
      head_dim: channels; wide heads leave registers for one computing warpgroup only.
      page_size: tokens of a page.
      itemsize: bytes of a channel in a page.
    """
    warpgroups = 1 if head_dim == 256 else 2
    found = []
    for tokens, turns, waves in itertools.product((32, 64, 128), (1, 2, 4), (1, 2)):
        pages, stages = tokens // page_size, turns * warpgroups
        converted = tokens * warpgroups if itemsize == 1 else 0
        needed = stages * blocks.stage_bytes(pages, page_size, head_dim, itemsize)
        fits = needed <= blocks.free_bytes(head_dim, converted) and stages * pages <= 32
        columns = tokens if page_size >= 32 or itemsize == 1 else 2 * tokens  # of logits, in registers
        registers = columns <= 128 and columns * head_dim <= 128 * 128
        whole = itemsize * tokens >= TILE_ROWS and (pages > 1 or page_size == TILE_ROWS)
        if pages and fits and registers and whole and (waves == 1 or tokens == 64):
            found.append((pages, stages, warpgroups, waves))
    return found


def _entry(case: Case, dims: Dimensions, cut: blocks.Cut) -> dict:
    pages, stages, warpgroups, waves = cut
    return {
        "chip": chip(),
        "head_dim": dims.head_dim,
        "page_size": dims.page_size,
        "itemsize": jnp.dtype(dims.cache_dtype).itemsize,
        "rows": case.window * dims.group,
        "pages": case.batch * dims.kv_heads * case.selected(dims),
        "blocks": {"pages": pages, "stages": stages, "warpgroups": warpgroups, "waves": waves},
    }


if __name__ == "__main__":
    tyro.cli(Tune).run()
