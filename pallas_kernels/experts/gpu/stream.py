"""Chosen experts on Hopper GPUs: one launch, in which the memory never rests.

Few tokens make a product that is bound by reading the matrix, so it is the matrix whose columns fill the rows
of a wgmma, and the tokens are its columns. Every block has its part of the tiles of all matrices, and loads
them in one order into a ring of stages: gate and up of the experts first, then down. What goes into the
latter is complete when all blocks have met; meanwhile their tiles are on the way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class _Cut:
    """How products are cut into tiles, and these into the steps of a block.

    Attributes:
      rows: tokens.
      width: of the hidden states.
      hidden: of an expert.
      parts: in which gate and up lie joined.
      blocks: of threads.
      itemsize: bytes of a number.
    """

    rows: int
    width: int
    hidden: int
    parts: int
    blocks: int
    itemsize: int

    @property
    def pair(self) -> int:
        """Tiles of down beside each other in a stage."""
        return tiles_beside(self.width)

    @property
    def deep(self) -> int:
        """Tiles above each other in a stage: one of few bytes takes longer to issue than to arrive."""
        return 2 if self.pair == 2 and self.hidden % (2 * TILE) == 0 else 1

    @property
    def depth(self) -> int:
        """Rows of a matrix in a stage."""
        return self.deep * TILE

    @property
    def hidden_tiles(self) -> int:
        """Tiles of gate, and as many of up, of an expert."""
        return self.hidden // TILE

    @property
    def steps(self) -> int:
        """Of a tile of gate and up."""
        return self.width // self.depth

    @property
    def inner_steps(self) -> int:
        """Of a tile of down, for an expert."""
        return self.hidden // self.depth

    @property
    def out_tiles(self) -> int:
        """Pairs of tiles of the output."""
        return self.width // (self.pair * TILE)

    @property
    def splits(self) -> int:
        """Parts of the depth of down, each in blocks of its own."""
        return self.blocks // self.out_tiles

    @property
    def stages(self) -> int:
        """Of the ring: as many as shared memory has room for."""
        room = SHARED_MEMORY - _RESERVED - self.rows * TILE * 4
        return min(STAGES // self.deep, room // (self.depth * (2 * TILE + self.rows) * self.itemsize))

    @property
    def ahead(self) -> int:
        """Steps whose tiles are on their way while one is multiplied."""
        return self.stages - 1

    def hidden_columns(self, tile: Array) -> list[Any]:
        """Where a tile lies, of gate and of up."""
        each = self.hidden_tiles // self.parts
        part, within = lax.div(tile, jnp.int32(each)), lax.rem(tile, jnp.int32(each))
        gate = (part * (2 * each) + within) * TILE
        return [pl.ds(gate, TILE), pl.ds(gate + each * TILE, TILE)]


class _Refs(NamedTuple):
    """What a block sees: arguments, results (inner [C * hidden_tiles, R, TILE]), and its shared memory."""

    h: Any
    gate_up: Any
    down: Any
    bias: Any
    ids: Any
    count: Any
    shares: Any
    counter: Any
    inner: Any
    out: Any
    rows: Any
    tiles: Any
    sums: Any
    loaded: Any
    rows_loaded: Any
    met: tuple[Any, ...]

    @classmethod
    def of(cls, refs: Sequence[Any], biased: bool) -> "_Refs":
        """As the kernel gets them."""
        refs = list(refs)
        if not biased:
            refs.insert(3, None)
        named = len(cls._fields) - 1
        return cls(*refs[:named], met=tuple(refs[named:]))


def _of_expert(number: Array, each: int) -> tuple[Array, Array]:
    """Which of the chosen experts, and which of `each` things of it."""
    return lax.div(number, jnp.int32(each)), lax.rem(number, jnp.int32(each))


class _Block:
    """The steps of one block: those of its tiles of gate and up come `before` those of its tile of down.

    Attributes:
      number: of the block.
      mine: its tiles of gate and up.
      split: which part of the depth of down it has, if that is one; `first` to `last` of its steps.
      out_tile: which pair of tiles of the output.
      before: steps of gate and up.
      total: of all.
    """

    def __init__(self, cut: _Cut, refs: _Refs):
        self.cut, self.refs = cut, refs
        self.number = lax.axis_index(BLOCK)
        count, blocks = refs.count, jnp.int32(cut.blocks)
        self.mine = lax.div(count[0] * cut.hidden_tiles - self.number + (cut.blocks - 1), blocks)
        out_tiles = jnp.int32(cut.out_tiles)
        self.split, self.out_tile = lax.div(self.number, out_tiles), lax.rem(self.number, out_tiles)
        self.first, self.last = (
            lax.div(jnp.minimum(part, cut.splits) * (count[0] * cut.inner_steps), jnp.int32(cut.splits))
            for part in (self.split, self.split + 1)
        )
        self.before = self.mine * cut.steps
        self.total = self.mine * cut.steps + self.last - self.first

    def fill(self) -> None:
        """Starts the copies of as many steps as the ring holds, but for rows that are not there yet."""

        @pl.loop(jnp.int32(0), jnp.minimum(self.cut.ahead, self.total))
        def _(step):
            self.load(step)
            pl.when(step < self.before)(lambda: self.load_rows(step))

    def load(self, step: Array) -> None:
        """Starts the copies of a step's tiles."""
        cut, refs = self.cut, self.refs
        stage, ready = refs.tiles.at[self._place(step)], refs.loaded.at[self._place(step)]

        @pl.when(step < self.before)
        def _():
            number, k = self._unit(step)
            nth, tile = _of_expert(number, cut.hidden_tiles)
            source = refs.gate_up.at[refs.ids[nth], pl.ds(k * cut.depth, cut.depth)]
            for half, columns in enumerate(cut.hidden_columns(tile)):
                plgpu.copy_gmem_to_smem(source.at[:, columns], stage.at[half], ready)

        @pl.when(step >= self.before)
        def _():
            nth, k = _of_expert(self.first + step - self.before, cut.inner_steps)
            source, column = refs.down.at[refs.ids[nth]], self.out_tile * (cut.pair * TILE)
            size = cut.depth if cut.pair == 2 else cut.depth // 2  # one tile is copied in halves
            for half in range(2):
                if cut.pair == 2:
                    at, columns, target = 0, pl.ds(column + half * TILE, TILE), stage.at[half]
                else:
                    at, columns = half * size, pl.ds(column, TILE)
                    target = stage.at[0, pl.ds(half * size, size)]
                plgpu.copy_gmem_to_smem(source.at[pl.ds(k * cut.depth + at, size), columns], target, ready)

    def load_rows(self, step: Array) -> None:
        """Starts the copy of what a step's tiles are multiplied with."""
        refs, deep = self.refs, self.cut.deep
        stage, ready = refs.rows.at[self._place(step)], refs.rows_loaded.at[self._place(step)]

        @pl.when(step < self.before)
        def _():
            for k in range(deep):
                at = pl.ds((self._unit(step)[1] * deep + k) * TILE, TILE)
                plgpu.copy_gmem_to_smem(refs.h.at[:, at], stage.at[k], ready)

        @pl.when(step >= self.before)
        def _():
            for k in range(deep):
                source = refs.inner.at[(self.first + step - self.before) * deep + k]
                plgpu.copy_gmem_to_smem(source, stage.at[k], ready)

    def multiply(self, start: Array, number: Array | int, end: Array, halves: int) -> list[Array]:
        """The products of so many steps' tiles, summed; loads until `end` keep the ring full.

        Rows of a step are loaded with its tiles, or before by the caller.
        """
        refs, deep = self.refs, self.cut.deep

        def sums(*accs):
            def add(index, _):
                step = start + index
                place, later = self._place(step), step + self.cut.ahead
                plgpu.barrier_wait(refs.loaded.at[place])
                plgpu.barrier_wait(refs.rows_loaded.at[place])
                for k in range(deep):
                    columns = refs.rows.at[place, k].transpose((1, 0))
                    for half, acc in enumerate(accs):
                        tile = refs.tiles.at[place, half, pl.ds(k * TILE, TILE)]
                        plgpu.wgmma(acc, tile.transpose((1, 0)), columns)
                # What the step before this one has read can be overwritten.
                plgpu.wgmma_wait(deep * len(accs))
                pl.when(later < self.total)(lambda: self.load(later))
                pl.when(later < end)(lambda: self.load_rows(later))

            lax.fori_loop(0, number, add, None)
            return [acc[...] for acc in accs]

        return pl.run_scoped(sums, *[plgpu.ACC((TILE, self.cut.rows), jnp.float32)] * halves)

    def transposed(self, columns: Array) -> Array:
        """Rows whose columns these are, in a layout in which they are written."""
        sums = self.refs.sums
        sums.transpose((1, 0))[...] = plgpu.layout_cast(columns, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        result = plgpu.load(sums, layout=_ROWS_OF_64, optimized=False)
        plgpu.commit_smem()
        return result

    def _place(self, step: Array) -> Array:
        """Of a step in the ring."""
        return lax.rem(step, jnp.int32(self.cut.stages))

    def _unit(self, step: Array) -> tuple[Array, Array]:
        """The tile of gate and up of a step, and which of its depth."""
        steps = jnp.int32(self.cut.steps)
        return lax.div(step, steps) * self.cut.blocks + self.number, lax.rem(step, steps)


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
    cut = _Cut(rows, width, down.shape[1], parts, blocks, h.dtype.itemsize)
    biased = gate_up_bias is not None

    def body(*args):
        refs = _Refs.of(args, biased)
        block = _Block(cut, refs)
        block.fill()

        @pl.loop(jnp.int32(0), block.mine)
        def _(turn):
            number = turn * blocks + block.number
            nth, tile = _of_expert(number, cut.hidden_tiles)
            expert = refs.ids[nth]
            share = plgpu.load(refs.shares.at[:, expert], layout=_ROWS_OF_64.reduce(1), optimized=False)
            layout, biases = plgpu.Layout.WGMMA.reduce(1), []
            if biased:
                there = [refs.bias.at[expert, columns] for columns in cut.hidden_columns(tile)]
                biases = [plgpu.load(bias, layout=layout, optimized=False) for bias in there]
            gate, up = block.multiply(turn * cut.steps, cut.steps, block.before, 2)
            if biased:
                gate, up = (
                    value + lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, [0])
                    for value, bias in zip((gate, up), biases, strict=True)
                )
            inner = block.transposed(activation(gate, up))
            share = lax.broadcast_in_dim(share, inner.shape, [0])
            refs.inner[number] = jnp.where(share > 0, inner * share, 0.0).astype(h.dtype)

        # What goes into down is complete when all have met.
        if interpret is None:
            meet(refs.counter, blocks)
        else:
            meet_in_cluster(*refs.met, interpret)

        pl.loop(block.before, jnp.minimum(block.before + cut.ahead, block.total))(block.load_rows)

        @pl.when(block.split < cut.splits)
        def _():
            sums = block.multiply(block.before, block.last - block.first, block.total, cut.pair)
            for half, columns in enumerate(sums):
                own = pl.ds((block.out_tile * cut.pair + half) * TILE, TILE)
                refs.out[block.split, :, own] = block.transposed(columns)

    launch = kernel(
        body,
        name="apply_experts",
        out_type=[
            jax.ShapeDtypeStruct((ids.shape[0] * cut.hidden_tiles, rows, TILE), h.dtype),
            jax.ShapeDtypeStruct((cut.splits, rows, width), jnp.float32),
        ],
        **grid_of(blocks, interpret),
        scratch=[
            matrix((cut.stages, cut.deep, rows, TILE), h.dtype),
            matrix((cut.stages, 2, cut.depth, TILE), gate_up.dtype),
            plgpu.SMEM((rows, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=cut.deep, num_barriers=cut.stages),
            *([] if interpret is None else [cluster_barrier()]),
        ],
        interpret=interpret,
    )
    biases = [gate_up_bias] if biased else []
    _, out = launch(h, gate_up, down, *biases, ids, count, shares, jax.new_ref(zero))
    return out
