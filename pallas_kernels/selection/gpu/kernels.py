"""Page selection on Hopper GPUs: scores on the matrix unit, then a search for their threshold, no sorting.

Two launches. `_score` multiplies page statistics with the query's coefficients: every score of `SCORES` is
linear in them. `_choose` searches for the score that admits as many pages as the budget, then every block
writes the chosen pages of its part, in the order of pages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import (
    SHARED_MEMORY,
    TILE_ROWS,
    check_support,
    kernel,
    matrix,
    num_multiprocessors,
)
from pallas_kernels.operation import operation
from pallas_kernels.scores import SCORES, check_kernel
from pallas_kernels.selection.gpu.compaction import write_pages
from pallas_kernels.selection.gpu.threshold import chosen, count, find_threshold
from pallas_kernels.statistics import Statistics

_MAX_STAGES = 4
_EIGHT_ROWS = plgpu.Layout.TILED(  # of 64 columns or more: two to a warp, four neighbours to a thread
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_CHUNK = 32  # tiles that are counted at once


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
    check_kernel("Mosaic GPU", statistics, score, group_reduce)
    statistics = statistics.values
    D, P = q.shape[-1], statistics.shape[2]
    check_support(statistics.dtype, D, page_size)
    if P < TILE_ROWS:
        raise NotImplementedError(
            f"select_pages: a cache of {P} pages is smaller than the Mosaic GPU kernel's tile of {TILE_ROWS}"
        )
    if P % 8:
        raise NotImplementedError(
            f"select_pages: {P} pages are not a multiple of 8, as the Mosaic GPU kernel needs"
        )
    tiles = -(-P // TILE_ROWS)
    tiles = -(-tiles // 8) * 8 if tiles <= _CHUNK else -(-tiles // _CHUNK) * _CHUNK
    if tiles * TILE_ROWS * 4 > SHARED_MEMORY - 8192:
        raise NotImplementedError(
            f"select_pages: scores of {P} pages do not fit the shared memory of the Mosaic GPU kernel "
            f"({SHARED_MEMORY} bytes)"
        )
    group, Z = q.shape[1] // statistics.shape[1], statistics.shape[3]
    if _stages(group, Z, D) < 1:
        raise NotImplementedError(
            f"select_pages: {Z} vectors of head_dim {D} for {group} heads of a group do not fit the shared "
            f"memory of the Mosaic GPU kernel ({SHARED_MEMORY} bytes)"
        )
    parts = parts or max(1, min(tiles // 8, 8))

    scores = _score(q, statistics, positions, page_size, tiles, score, group_reduce, sink_pages, interpret)
    return _choose(scores, positions, budgets, page_size, capacity, sink_pages, parts, interpret)


def _stages(group, Z, D):
    """How many tiles of statistics fit the shared memory beside the queries and their coefficients."""
    heads = -(-group // 8) * 8
    return min(_MAX_STAGES, (SHARED_MEMORY - heads * Z * D * 2 * 2 - 4096) // (TILE_ROWS * Z * D * 2))


def _page_of(position, page_size):
    """The page of a position; -1 for position -1."""
    return lax.div(position + page_size, jnp.int32(page_size)) - 1


def _score(q, statistics, positions, page_size, tiles, score, group_reduce, sink_pages, interpret):
    """Scores[B, K, tiles, 64] of every page: infinite if it is forced, -infinite beyond the newest."""
    B, N, D = q.shape
    K, P, Z = statistics.shape[1:4]
    group, dtype = N // K, statistics.dtype
    heads = -(-group // 8) * 8
    parts = max(1, min(tiles, num_multiprocessors() // (B * K)))
    coefficients = SCORES[score].coefficients
    stages = _stages(group, Z, D)

    def body(
        q_ref,  # [B, K, G, D]
        statistics_ref,  # [B, K, P, Z * D]
        positions_ref,  # [B]
        scores_ref,  # [B, K, tiles, 64]
        q_smem,  # [heads, D]
        c_smem,  # [heads, Z * D]: coefficients
        s_smem,  # [stages, 64, Z * D]
        q_ready,
        ready,
    ):
        b, head, part = (lax.axis_index(axis) for axis in ("sequence", "head", "part"))
        newest = _page_of(positions_ref[b], page_size)
        mine = lax.div(tiles - 1 - part, jnp.int32(parts)) + 1
        used = jnp.maximum(lax.div(lax.div(newest, jnp.int32(TILE_ROWS)) - part, jnp.int32(parts)) + 1, 0)
        used = jnp.where(newest < part * TILE_ROWS, 0, jnp.minimum(used, mine))

        def load(index):
            stage = lax.rem(index, jnp.int32(stages))
            pages = pl.ds((part + index * parts) * TILE_ROWS, TILE_ROWS)
            plgpu.copy_gmem_to_smem(statistics_ref.at[b, head, pages], s_smem.at[stage], ready.at[stage])

        plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_smem.at[pl.ds(0, group)], q_ready)
        pl.loop(jnp.int32(0), jnp.minimum(used, stages))(load)
        per_row = plgpu.Layout.WGMMA.reduce(1)
        row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=per_row)
        column = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS, heads), 1, layout=plgpu.Layout.WGMMA)

        plgpu.barrier_wait(q_ready)
        for z, values in enumerate(coefficients(plgpu.load(q_smem, layout=_EIGHT_ROWS, optimized=False))):
            c_smem[:, pl.ds(z * D, D)] = values
        plgpu.commit_smem()

        @pl.loop(jnp.int32(0), used)
        def _(index):
            stage = lax.rem(index, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])

            def multiply(acc):
                plgpu.wgmma(acc, s_smem.at[stage], c_smem.transpose((1, 0)))
                return acc[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, heads), jnp.float32))
            pl.when(index + stages < used)(lambda: load(index + stages))
            if group_reduce == "max":
                scores = jnp.where(column < group, scores, -jnp.inf).max(axis=1)
            else:
                scores = jnp.where(column < group, scores, 0.0).sum(axis=1) * (1 / group)
            tile = part + index * parts
            page = row + tile * TILE_ROWS
            scores = jnp.where(page < sink_pages, jnp.inf, scores)
            scores = jnp.where(page == newest, jnp.inf, scores)
            scores_ref[b, head, tile] = jnp.where(page > newest, -jnp.inf, scores)

        @pl.loop(used, mine)
        def _(index):
            scores_ref[b, head, part + index * parts] = plgpu.layout_cast(
                jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), per_row
            )

    launch = kernel(
        body,
        name="score_pages",
        out_type=[jax.ShapeDtypeStruct((B, K, tiles, TILE_ROWS), jnp.float32)],
        grid=(B, K, parts),
        grid_names=("sequence", "head", "part"),
        scratch=[
            plgpu.SMEM((heads, D), dtype),
            matrix((heads, Z * D), dtype),
            matrix((stages, TILE_ROWS, Z * D), dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
        ],
        interpret=interpret,
    )
    return launch(q.reshape(B, K, group, D).astype(dtype), statistics.reshape(B, K, P, Z * D), positions)[0]


def _choose(scores, positions, budgets, page_size, capacity, sink_pages, parts, interpret):
    """The budget's pages with the highest scores, ties to the lower page.

    Returns:
      page_ids[B, K, C] in ascending order, counts[B, K].
    """
    B, K, tiles, _ = scores.shape
    chunk = min(_CHUNK, tiles)
    layout = plgpu.Layout.WG_STRIDED((chunk, TILE_ROWS), vec_size=4)
    share = -(-tiles // parts)

    def body(
        scores_ref,  # [B, K, tiles, 64]
        positions_ref,  # [B], as budgets
        budgets_ref,
        ids_ref,  # [B, K, C]
        counts_ref,  # [B, K]
        scores_smem,  # [tiles, 64]
        warps_smem,  # [4]
        ready,
    ):
        b, head, part = (lax.axis_index(axis) for axis in ("sequence", "head", "part"))
        for start in range(0, tiles, 256):
            here = pl.ds(start, min(256, tiles - start))
            plgpu.copy_gmem_to_smem(scores_ref.at[b, head, here], scores_smem.at[here], ready)
        pages = _page_of(positions_ref[b], page_size) + 1
        budget = jnp.minimum(budgets_ref[b], pages)
        chunks = lax.div(pages + (chunk * TILE_ROWS - 1), jnp.int32(chunk * TILE_ROWS))
        place = plgpu.broadcasted_iota(jnp.int32, (chunk, TILE_ROWS), 0, layout=layout) * TILE_ROWS
        place += plgpu.broadcasted_iota(jnp.int32, (chunk, TILE_ROWS), 1, layout=layout)

        @pl.when(part == 0)
        def _():
            counts_ref[b, head] = budget

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
        write = _write_one_by_one if interpret is not None else write_pages
        write(scores_smem, warps_smem, ids_ref.at[b, head], start, end, offset, budget, high, ties)

    launch = kernel(
        body,
        name="choose_pages",
        out_type=[jax.ShapeDtypeStruct((B, K, capacity), jnp.int32), jax.ShapeDtypeStruct((B, K), jnp.int32)],
        grid=(B, K, parts),
        grid_names=("sequence", "head", "part"),
        scratch=[
            plgpu.SMEM((tiles, TILE_ROWS), jnp.float32),
            plgpu.SMEM((4,), jnp.int32),
            plgpu.Barrier(num_arrivals=-(-tiles // 256)),
        ],
        interpret=interpret,
    )
    return launch(scores, positions, budgets)


def _write_one_by_one(scores_smem, _, ids_ref, start, end, offset, budget, high, ties):
    """As `write_pages`, where its instructions cannot be simulated."""

    def write(page, offset):
        score = scores_smem[lax.div(page, jnp.int32(TILE_ROWS)), lax.rem(page, jnp.int32(TILE_ROWS))]
        take = chosen(score, page, high, ties) & (offset < budget)

        @pl.when(take)
        def _():
            ids_ref[offset] = page

        return offset + take.astype(jnp.int32)

    lax.fori_loop(start, end, write, offset)
