"""Scores of pages on the matrix unit: statistics times the query's coefficients, a tile of 64 pages at once.

Statistics in 8 bits are converted in registers to 16, which hold every value of theirs; the product is then
multiplied by their scales.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import LOG2E, SHARED_MEMORY, TILE_ROWS, kernel, matrix, num_multiprocessors
from pallas_kernels.scores import SCORES
from pallas_kernels.statistics import Statistics

LOWEST = -1e30
"""The logit of what is no page before the newest: finite, so that its difference to itself is not NaN."""
_MAX_STAGES = 4


def _eight_rows(columns: int) -> Any:
    """The layout of vectors of 16, 32 or a multiple of 64 elements: two to a warp, 16 threads to each."""
    width = min(columns, 64)
    tiling = plgpu.Tiling(((8, width), (2, width), (width // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def page_of(position, page_size):
    """The page of a position; -1 for position -1."""
    return lax.div(position + page_size, jnp.int32(page_size)) - 1


def comparable(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scores by which pages can be chosen: what is too low or no number counts as `LOWEST`."""
    return jnp.where(scores > LOWEST, jnp.minimum(scores, -LOWEST), LOWEST)


def padded_heads(group: int) -> int:
    """Query heads of a group as columns of a wgmma."""
    return -(-group // 8) * 8


def stages(group: int, statistics: Statistics, itemsize: int) -> int:
    """How many tiles of statistics fit the shared memory beside the queries and their coefficients."""
    Z, D = statistics.values.shape[-2:]
    queries = padded_heads(group) * (1 + Z) * D * itemsize
    tile = TILE_ROWS * Z * (D * statistics.values.dtype.itemsize + 4 * (statistics.scales is not None))
    return min(_MAX_STAGES, (SHARED_MEMORY - queries - 4096) // tile)


def blocks_of_threads(rows: int, tiles: int) -> int:
    """Among how many blocks the tiles of each of `rows`, a sequence's KV head, are divided."""
    return max(1, min(tiles, num_multiprocessors() // rows))


def score_pages(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    *,
    page_size: int,
    tiles: int,
    score: str,
    group_reduce: str,
    sink_pages: int,
    interpret: Any,
) -> tuple[Array, ...]:
    """Scores every page up to the newest.

    Returns:
      scores[B, K, 1, tiles, 64]: infinite for a page that is forced, -infinite beyond the newest. If the
      heads of a group are reduced by "mass", each head's logits[B, K, G, tiles, 64], times log2(e), of the
      pages before the newest, others arbitrary, and norms[B, K, blocks, heads]: log2 of the sums of their
      powers of two over the pages of one block of threads; blocks and heads are padded by arbitrary values.
    """
    B, N, D = q.shape
    K, P, Z = statistics.values.shape[1:4]
    group, mass, eight = N // K, group_reduce == "mass", statistics.scales is not None
    dtype = q.dtype if eight else statistics.values.dtype
    heads = padded_heads(group)
    parts = blocks_of_threads(B * K, tiles)
    coefficients = SCORES[score].coefficients
    depth = stages(group, statistics, dtype.itemsize)
    rows = min(P, TILE_ROWS)
    per_row = plgpu.Layout.WGMMA.reduce(1)

    def body(*refs):
        refs = iter(refs)
        q_ref = next(refs)  # [B, K, G, D]
        values_ref = next(refs)  # [B, K, P, Z * D]
        scales_ref = next(refs) if eight else None  # [B, K, P]
        positions_ref = next(refs)  # [B]
        scores_ref = next(refs)  # [B, K, G or 1, tiles, 64]
        norms_ref = next(refs) if mass else None  # [B, K, blocks, heads]
        q_smem = next(refs)  # [heads, D]
        c_smem = next(refs)  # [heads, Z * D]: coefficients
        s_smem = next(refs)  # [depth, 64, Z * D]
        scales_smem = next(refs) if eight else None  # [depth, 64]
        q_ready, ready = refs
        b, head, part = (lax.axis_index(axis) for axis in ("sequence", "head", "part"))
        newest = page_of(positions_ref[b], page_size)
        mine = lax.div(tiles - 1 - part, jnp.int32(parts)) + 1
        used = jnp.maximum(lax.div(lax.div(newest, jnp.int32(TILE_ROWS)) - part, jnp.int32(parts)) + 1, 0)
        used = jnp.where(newest < part * TILE_ROWS, 0, jnp.minimum(used, mine))

        def load(index):
            stage = lax.rem(index, jnp.int32(depth))
            pages, here = pl.ds((part + index * parts) * TILE_ROWS, rows), pl.ds(0, rows)
            plgpu.copy_gmem_to_smem(values_ref.at[b, head, pages], s_smem.at[stage, here], ready.at[stage])
            if eight:
                plgpu.copy_gmem_to_smem(
                    scales_ref.at[b, head, pages], scales_smem.at[stage, here], ready.at[stage]
                )

        plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_smem.at[pl.ds(0, group)], q_ready)
        pl.loop(jnp.int32(0), jnp.minimum(used, depth))(load)
        row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=per_row)
        column = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS, heads), 1, layout=plgpu.Layout.WGMMA)

        plgpu.barrier_wait(q_ready)
        for z, values in enumerate(coefficients(plgpu.load(q_smem, layout=_eight_rows(D), optimized=False))):
            c_smem[:, pl.ds(z * D, D)] = values
        plgpu.commit_smem()

        def product(stage):
            """A tile's scores[64, heads] for each query head."""
            weights = c_smem.transpose((1, 0))
            if not eight:
                operand = s_smem.at[stage]
            else:
                layout = plgpu.Layout.WGMMA_UPCAST_2X
                units = plgpu.load(s_smem.at[stage], layout=layout, optimized=False).astype(dtype)
                operand = plgpu.layout_cast(units, plgpu.Layout.WGMMA)
            if eight and interpret is not None:  # which has no wgmma with an operand in registers
                scores = jnp.dot(operand, weights[...], preferred_element_type=jnp.float32)
            else:

                def multiply(acc):
                    plgpu.wgmma(acc, operand, weights)
                    return acc[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, heads), jnp.float32))
            if not eight:
                return scores
            scales = plgpu.load(scales_smem.at[stage], layout=per_row, optimized=False)
            return scores * lax.broadcast_in_dim(scales, scores.shape, [0])

        def next_product(index):
            stage = lax.rem(index, jnp.int32(depth))
            plgpu.barrier_wait(ready.at[stage])
            scores = product(stage)
            pl.when(index + depth < used)(lambda: load(index + depth))
            return scores, part + index * parts

        def reduced(index):
            scores, tile = next_product(index)
            if group_reduce == "max":
                scores = jnp.where(column < group, scores, -jnp.inf).max(axis=1)
            else:
                scores = jnp.where(column < group, scores, 0.0).sum(axis=1) * (1 / group)
            page = row + tile * TILE_ROWS
            scores = jnp.where(page < sink_pages, jnp.inf, comparable(scores))
            scores = jnp.where(page == newest, jnp.inf, scores)
            scores_ref[b, head, 0, tile] = jnp.where(page > newest, -jnp.inf, scores)

        def logits(index, carry):
            """Running maxima and sums of powers of two, of each row and head by itself."""
            highest, total = carry
            scores, tile = next_product(index)
            before = lax.broadcast_in_dim(row + tile * TILE_ROWS < newest, scores.shape, [0])
            scores = jnp.where(before, scores * (LOG2E * D**-0.5), LOWEST)
            for g in range(group):
                scores_ref[b, head, g, tile] = jnp.where(column == g, scores, 0.0).sum(axis=1)
            higher = jnp.maximum(highest, scores)
            return higher, total * jnp.exp2(highest - higher) + jnp.exp2(scores - higher)

        if mass:
            start = [jnp.full((TILE_ROWS, heads), value, jnp.float32) for value in (LOWEST, 0.0)]
            start = [plgpu.layout_cast(array, plgpu.Layout.WGMMA) for array in start]
            highest, total = lax.fori_loop(jnp.int32(0), used, logits, tuple(start))
            top = highest.max(axis=0)
            total *= jnp.exp2(highest - lax.broadcast_in_dim(top, highest.shape, [1]))
            norms_ref[b, head, part] = top + jnp.log2(total.sum(axis=0))
            return

        pl.loop(jnp.int32(0), used)(reduced)

        @pl.loop(used, mine)
        def _(index):
            scores_ref[b, head, 0, part + index * parts] = plgpu.layout_cast(
                jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), per_row
            )

    scratch = [
        plgpu.SMEM((heads, D), dtype),
        matrix((heads, Z * D), dtype),
        # Rows of 16 bytes, which go to registers only, are too short to be swizzled.
        (matrix if Z * D * statistics.values.dtype.itemsize > 16 else plgpu.SMEM)(
            (depth, TILE_ROWS, Z * D), statistics.values.dtype
        ),
        *([plgpu.SMEM((depth, TILE_ROWS), jnp.float32)] if eight else []),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=1 + eight, num_barriers=depth),
    ]
    out_type = [jax.ShapeDtypeStruct((B, K, group if mass else 1, tiles, TILE_ROWS), jnp.float32)]
    if mass:
        out_type.append(jax.ShapeDtypeStruct((B, K, -(-parts // 32) * 32, heads), jnp.float32))
    launch = kernel(
        body,
        name="score_pages",
        out_type=out_type,
        grid=(B, K, parts),
        grid_names=("sequence", "head", "part"),
        scratch=scratch,
        interpret=interpret,
    )
    kept = [statistics.values.reshape(B, K, P, Z * D)]
    if eight:
        kept.append(statistics.scales.reshape(B, K, P))
    return launch(q.reshape(B, K, group, D).astype(dtype), *kept, positions)
