"""Chosen experts on Hopper GPUs: one launch, in which the memory never rests.

Few tokens make a product that is bound by reading the matrix, so it is the matrix whose columns fill the rows
of a wgmma, and the tokens are its columns. Every block has its part of the tiles of all matrices, and loads
them in one order into a ring of stages: gate and up of the experts first, then down. What goes into the
latter is complete when all blocks have met; meanwhile their tiles are on the way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import SHARED_MEMORY, kernel, matrix
from pallas_kernels.grid_barrier import BLOCK, cluster_barrier, grid_of, meet, meet_in_cluster

TILE = 64
"""Rows and columns of a tile."""
STAGES = 12
"""Pairs of tiles that are on their way or in use, at most."""
_RESERVED = 4096  # bytes of shared memory for barriers and reductions
_ROWS_OF_64 = plgpu.Layout.TILED(  # two to a warp, four neighbours to a thread
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def tiles_beside(width: int) -> int:
    """How many tiles of down, beside each other, go through the ring at once."""
    return 2 if width % (2 * TILE) == 0 else 1


def apply_chosen(
    h: Float[Array, "R M"],
    gate_up: Float[Array, "E M columns"],
    down: Float[Array, "E F M"],
    gate_up_bias: Float[Array, "E columns"] | None,
    ids: Int[Array, " C"],
    count: Int[Array, "1"],
    shares: Float[Array, "R more"],
    zero: Int[Array, "1"],
    *,
    parts: int,
    activation: Callable[[Array, Array], Array],
    blocks: int,
    interpret: Any,
) -> Float[Array, "splits R M"]:
    """The weighted sums of the outputs of chosen experts, without biases of down, in parts to be added up.

    Args:
      h: rows, a multiple of 8 of them.
      gate_up: weights.
      down: weights.
      gate_up_bias: of gate and up; None: there is none.
      ids: experts; what follows the first `count` has no meaning.
      count: how many are chosen.
      shares: of experts in the output of each row; 0 where a row did not choose one.
      zero: for blocks to count themselves with; has no meaning afterwards.
      parts: in which gate and up lie joined.
      activation: of gate and up, elementwise.
      blocks: of threads, which all run at once.
      interpret: `InterpretGPUParams` to run it in the interpreter.
    """
    rows, width = h.shape
    hidden, pair = down.shape[1], tiles_beside(width)
    out_tiles = width // (pair * TILE)
    splits = blocks // out_tiles
    # Tiles above each other in a stage: a stage of few bytes takes longer to issue than to arrive.
    deep = 2 if pair == 2 and hidden % (2 * TILE) == 0 else 1
    depth, hidden_tiles = deep * TILE, hidden // TILE
    steps, inner_steps = width // depth, hidden // depth  # of a tile of gate and up; of down, for an expert
    room = SHARED_MEMORY - _RESERVED - rows * TILE * 4
    stages = min(STAGES // deep, room // (depth * (2 * TILE + rows) * h.dtype.itemsize))
    ahead = stages - 1
    size = depth if pair == 2 else depth // 2  # rows of down that are copied at once
    biased = gate_up_bias is not None

    def body(h_ref, gate_up_ref, down_ref, *refs):
        refs = list(refs)
        bias_ref = refs.pop(0) if biased else None
        ids_ref, count_ref, shares_ref, counter_ref = refs[:4]
        inner_ref, out_ref = refs[4:6]  # [C * hidden_tiles, R, TILE], [splits, R, M]
        rows_smem, tiles_smem, sums_smem, loaded, rows_loaded, *met = refs[6:]
        block = lax.axis_index(BLOCK)
        mine = lax.div(count_ref[0] * hidden_tiles - block + (blocks - 1), jnp.int32(blocks))
        split, out_tile = lax.div(block, jnp.int32(out_tiles)), lax.rem(block, jnp.int32(out_tiles))
        first, last = (
            lax.div(jnp.minimum(part, splits) * (count_ref[0] * inner_steps), jnp.int32(splits))
            for part in (split, split + 1)
        )
        before, total = mine * steps, mine * steps + last - first

        def place_of(step):
            return lax.rem(step, jnp.int32(stages))

        def of_expert(number, each):
            """Which of the chosen experts, and which of `each` things of it."""
            return lax.div(number, jnp.int32(each)), lax.rem(number, jnp.int32(each))

        def hidden_columns(tile):
            """Of gate and of up."""
            each = hidden_tiles // parts
            part, within = lax.div(tile, jnp.int32(each)), lax.rem(tile, jnp.int32(each))
            gate = (part * (2 * each) + within) * TILE
            return [pl.ds(gate, TILE), pl.ds(gate + each * TILE, TILE)]

        def unit(step):
            """The tile of gate and up of a step, and which of its depth."""
            return lax.div(step, jnp.int32(steps)) * blocks + block, lax.rem(step, jnp.int32(steps))

        def load(step):
            """Starts the copies of a step's tiles."""
            stage, ready = tiles_smem.at[place_of(step)], loaded.at[place_of(step)]

            @pl.when(step < before)
            def _():
                number, k = unit(step)
                nth, tile = of_expert(number, hidden_tiles)
                source = gate_up_ref.at[ids_ref[nth], pl.ds(k * depth, depth)]
                for half, columns in enumerate(hidden_columns(tile)):
                    plgpu.copy_gmem_to_smem(source.at[:, columns], stage.at[half], ready)

            @pl.when(step >= before)
            def _():
                nth, k = of_expert(first + step - before, inner_steps)
                source, column = down_ref.at[ids_ref[nth]], out_tile * (pair * TILE)
                for half in range(2):
                    if pair == 2:
                        at, columns, target = 0, pl.ds(column + half * TILE, TILE), stage.at[half]
                    else:  # one tile, in halves
                        at, columns, target = (
                            half * size,
                            pl.ds(column, TILE),
                            stage.at[0, pl.ds(half * size, size)],
                        )
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(k * depth + at, size), columns], target, ready)

        def load_rows(step):
            """Starts the copy of what a step's tiles are multiplied with."""
            stage, ready = rows_smem.at[place_of(step)], rows_loaded.at[place_of(step)]

            @pl.when(step < before)
            def _():
                for k in range(deep):
                    at = pl.ds((unit(step)[1] * deep + k) * TILE, TILE)
                    plgpu.copy_gmem_to_smem(h_ref.at[:, at], stage.at[k], ready)

            @pl.when(step >= before)
            def _():
                for k in range(deep):
                    source = inner_ref.at[(first + step - before) * deep + k]
                    plgpu.copy_gmem_to_smem(source, stage.at[k], ready)

        def multiply(start, number, end, halves):
            """The products of so many steps' tiles, summed; loads until `end` keep the ring full.

            Rows of a step are loaded with its tiles, or before by the caller.
            """

            def sums(*accs):
                def add(index, _):
                    step = start + index
                    place, later = place_of(step), step + ahead
                    plgpu.barrier_wait(loaded.at[place])
                    plgpu.barrier_wait(rows_loaded.at[place])
                    for k in range(deep):
                        columns = rows_smem.at[place, k].transpose((1, 0))
                        for half, acc in enumerate(accs):
                            tile = tiles_smem.at[place, half, pl.ds(k * TILE, TILE)]
                            plgpu.wgmma(acc, tile.transpose((1, 0)), columns)
                    plgpu.wgmma_wait(
                        deep * len(accs)
                    )  # what the step before this one has read can be overwritten
                    pl.when(later < total)(lambda: load(later))
                    pl.when(later < end)(lambda: load_rows(later))

                lax.fori_loop(0, number, add, None)
                return [acc[...] for acc in accs]

            return pl.run_scoped(sums, *[plgpu.ACC((TILE, rows), jnp.float32)] * halves)

        def transposed(columns):
            """Rows whose columns these are, in a layout in which they are written."""
            sums_smem.transpose((1, 0))[...] = plgpu.layout_cast(columns, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            result = plgpu.load(sums_smem, layout=_ROWS_OF_64, optimized=False)
            plgpu.commit_smem()
            return result

        @pl.loop(jnp.int32(0), jnp.minimum(ahead, total))
        def _(step):
            load(step)
            pl.when(step < before)(lambda: load_rows(step))

        @pl.loop(jnp.int32(0), mine)
        def _(turn):
            number = turn * blocks + block
            nth, tile = of_expert(number, hidden_tiles)
            expert = ids_ref[nth]
            share = plgpu.load(shares_ref.at[:, expert], layout=_ROWS_OF_64.reduce(1), optimized=False)
            biases = []
            if biased:
                biases = [
                    plgpu.load(
                        bias_ref.at[expert, columns], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
                    )
                    for columns in hidden_columns(tile)
                ]
            gate, up = multiply(turn * steps, steps, before, 2)
            if biased:
                gate, up = (
                    value + lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, [0])
                    for value, bias in zip((gate, up), biases, strict=True)
                )
            inner = transposed(activation(gate, up))
            share = lax.broadcast_in_dim(share, inner.shape, [0])
            inner_ref[number] = jnp.where(share > 0, inner * share, 0.0).astype(h.dtype)

        if interpret is None:
            meet(counter_ref, blocks)
        else:
            meet_in_cluster(*met, interpret)

        pl.loop(before, jnp.minimum(before + ahead, total))(load_rows)

        @pl.when(split < splits)
        def _():
            for half, columns in enumerate(multiply(before, last - first, total, pair)):
                own = pl.ds((out_tile * pair + half) * TILE, TILE)
                out_ref[split, :, own] = transposed(columns)

    launch = kernel(
        body,
        name="apply_experts",
        out_type=[
            jax.ShapeDtypeStruct((ids.shape[0] * hidden_tiles, rows, TILE), h.dtype),
            jax.ShapeDtypeStruct((splits, rows, width), jnp.float32),
        ],
        **grid_of(blocks, interpret),
        scratch=[
            matrix((stages, deep, rows, TILE), h.dtype),
            matrix((stages, 2, depth, TILE), gate_up.dtype),
            plgpu.SMEM((rows, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=deep, num_barriers=stages),
            *([] if interpret is None else [cluster_barrier()]),
        ],
        interpret=interpret,
    )
    biases = [gate_up_bias] if biased else []
    _, out = launch(h, gate_up, down, *biases, ids, count, shares, jax.new_ref(zero))
    return out
