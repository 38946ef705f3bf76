"""The budget's pages with the highest scores: a search for their threshold, then compaction, no sorting."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.compaction import chosen, write_pages
from pallas_kernels.gpu import TILE_ROWS, kernel
from pallas_kernels.selection.gpu.scoring import LOWEST, blocks_of_threads, comparable, page_of
from pallas_kernels.selection.gpu.threshold import count, find_threshold

CHUNK = 32
"""Tiles that are counted at once."""
_COPIED = 256  # tiles of one copy
_SMALLEST = 2.0**-126  # shares below it count as alike, as they do where they are no normal numbers


def choose_pages(
    scored: Sequence[Array],
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    sink_pages: int,
    parts: int,
    interpret: Any,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """Chooses from what `score_pages` returns; ties go to the lower page.

    Returns:
      page_ids[B, K, C] in ascending order, counts[B, K].
    """
    mass = len(scored) == 2
    B, K, group, tiles, _ = scored[0].shape
    chunk = min(CHUNK, tiles)
    piece = chunk if group <= 8 else 8  # tiles whose logits of all heads fit the registers
    share = -(-tiles // parts)

    def body(*refs):
        refs = iter(refs)
        scores_ref = next(refs)  # [B, K, G or 1, tiles, 64]
        norms_ref = next(refs) if mass else None  # [B, K, blocks, heads]
        positions_ref = next(refs)  # [B], as budgets
        budgets_ref = next(refs)
        ids_ref = next(refs)  # [B, K, C]
        counts_ref = next(refs)  # [B, K]
        scores_smem = next(refs)  # [tiles, 64]
        warps_smem = next(refs)  # [4]
        b, head, part = (lax.axis_index(axis) for axis in ("sequence", "head", "part"))
        if not mass:
            (ready,) = refs
            for start in range(0, tiles, _COPIED):
                here = pl.ds(start, min(_COPIED, tiles - start))
                plgpu.copy_gmem_to_smem(scores_ref.at[b, head, 0, here], scores_smem.at[here], ready)
        pages = page_of(positions_ref[b], page_size) + 1
        budget = jnp.minimum(budgets_ref[b], pages)
        chunks = lax.div(pages + (chunk * TILE_ROWS - 1), jnp.int32(chunk * TILE_ROWS))
        layout, place = _pages_in(chunk)

        @pl.when(part == 0)
        def _():
            counts_ref[b, head] = budget

        if mass:
            norms = _log_sums(norms_ref.at[b, head], blocks_of_threads(B * K, tiles), group)
            spread, nth = _pages_in(piece)

            @pl.loop(jnp.int32(0), chunks * (chunk // piece))
            def _(index):
                here = pl.ds(index * piece, piece)
                logits = [plgpu.load(scores_ref.at[b, head, g, here], layout=spread) for g in range(group)]
                shares = sum(jnp.exp2(logit - norm) for logit, norm in zip(logits, norms, strict=True))
                scores = comparable(jnp.log2(jnp.maximum(shares, _SMALLEST)))
                page = nth + index * (piece * TILE_ROWS)
                scores = jnp.where((page == pages - 1) | (page < sink_pages), jnp.inf, scores)
                scores_smem[here] = jnp.where(page < pages, scores, -jnp.inf)

            plgpu.commit_smem()
        else:
            plgpu.barrier_wait(ready)

        def scan(step, *initial):
            """Folds `step(carry, scores, pages)` over all pages, elementwise over a chunk."""

            def advance(index, carry):
                values = plgpu.load(scores_smem.at[pl.ds(index * chunk, chunk)], layout=layout)
                return step(carry, values, place + index * (chunk * TILE_ROWS))

            full = [jnp.full((chunk, TILE_ROWS), value) for value in initial]
            return lax.fori_loop(0, chunks, advance, [plgpu.layout_cast(array, layout) for array in full])

        forced = jnp.minimum(pages, sink_pages) + jnp.where(pages > sink_pages, 1, 0)
        high, ties = find_threshold(scan, pages, budget, forced)

        start = part * (share * TILE_ROWS)
        offset = jnp.int32(0)
        if parts > 1:
            offset = count(scan, lambda score, page: chosen(score, page, high, ties) & (page < start))
        end = jnp.minimum(jnp.minimum(start + share * TILE_ROWS, tiles * TILE_ROWS), pages)
        scalars = start, end, offset, budget, high, ties
        write_pages(scores_smem, warps_smem, ids_ref.at[b, head], *scalars, interpret=interpret)

    launch = kernel(
        body,
        name="choose_pages",
        out_type=[jax.ShapeDtypeStruct((B, K, capacity), jnp.int32), jax.ShapeDtypeStruct((B, K), jnp.int32)],
        grid=(B, K, parts),
        grid_names=("sequence", "head", "part"),
        scratch=[
            plgpu.SMEM((tiles, TILE_ROWS), jnp.float32),
            plgpu.SMEM((4,), jnp.int32),
            *([] if mass else [plgpu.Barrier(num_arrivals=-(-tiles // _COPIED))]),
        ],
        interpret=interpret,
    )
    return launch(*scored, positions, budgets)


def _pages_in(tiles):
    """A layout for so many tiles, and each one's pages in it."""
    layout, shape = plgpu.Layout.WG_STRIDED((tiles, TILE_ROWS), vec_size=4), (tiles, TILE_ROWS)
    tile, row = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout) for axis in (0, 1))
    return layout, tile * TILE_ROWS + row


def _log_sums(norms_ref, blocks, group):
    """Joins the first `blocks` of norms[blocks, heads]: log2 of the sum of each head's powers of two."""
    layout = plgpu.Layout.TILED(  # every warp holds all, a thread some blocks of threads, with all heads
        plgpu.Tiling(((32, 4),)),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    norms = plgpu.load(norms_ref, layout=layout, optimized=False)
    block = plgpu.broadcasted_iota(jnp.int32, norms.shape, 0, layout=layout)
    norms = jnp.where(block < blocks, norms, LOWEST)
    top = norms.max(axis=0)
    joined = top + jnp.log2(jnp.exp2(norms - lax.broadcast_in_dim(top, norms.shape, [1])).sum(axis=0))
    head = plgpu.broadcasted_iota(jnp.int32, joined.shape, 0, layout=layout.reduce(0))
    return [jnp.sum(jnp.where(head == g, joined, 0.0)) for g in range(group)]
