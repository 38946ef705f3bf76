"""One block of threads of the attention kernel: a split of one sequence's and KV head's pages.

One warpgroup loads pages into a ring of stages, a TMA copy for each page (another for its scales, if it is
kept in 8 bits); the others take turns to compute. The window's slots and the heads of a group are the rows of
one matrix tile of 64, so that a page is loaded once for all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu.blocks import Blocks
from pallas_kernels.attention.gpu.tiles import (
    PER_COLUMN,
    PER_ROW,
    add_product,
    add_values,
    clear_unwritten,
    join,
    times_codes,
    times_keys,
)
from pallas_kernels.gpu import LOG2E, TILE_ROWS
from pallas_kernels.layout import KEYS, VALUES

LOWEST = -1e30
"""Of a running maximum: finite, so that its difference to -inf is not NaN."""
_NOWHERE = 1 << 30  # the position of a page that is not there


class Ring(NamedTuple):
    """A sliding window over pages in which position p lies at place p mod `places`.

    Attributes:
      window: positions that a query attends to, its own included.
      places: at least `window` and as many as the oldest query lies behind the newest.
    """

    window: int
    places: int


def attend_to_split(
    *refs: Any, blocks: Blocks, dense: bool, eight: bool, ring: Ring | None, interpret: bool
) -> None:
    """The kernel's body; `_attend` in `kernels.py` lists the references."""
    block = ThreadBlock(refs, blocks, dense, eight, ring, interpret)
    warpgroup = lax.axis_index("warpgroup")
    for turn in range(blocks.warpgroups):

        @pl.when(warpgroup == turn)
        def _(turn=turn):
            if not interpret:
                plgpu.set_max_registers(232 if blocks.warpgroups == 2 else 240, action="increase")
            block.compute(turn)

    @pl.when(warpgroup == blocks.warpgroups)
    def _():
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        block.load()


class ThreadBlock:
    """What the warpgroups of a block share.

    Args:
      refs: arguments (of pages in 8 bits: scales; of a selection: page_ids, counts, last_loaded), outputs,
        scratch.
      blocks: how the work is cut.
      dense: attend to all pages, without a selection.
      eight: pages are kept in 8 bits.
      ring: the pages are one, beside `dense`; None: they begin with position 0.
      interpret: run in the interpreter.
    """

    def __init__(
        self, refs: tuple, blocks: Blocks, dense: bool, eight: bool, ring: Ring | None, interpret: bool
    ):
        # Arguments: q[B, W, K, G, D], pages[B, K, P * 2 * S, D], positions[B, W]; scales[B, K, P * 2 * S];
        # page_ids[B, K, C], counts[B, K], last_loaded[B, K, P].
        self.q, self.pages, self.positions, *refs = refs
        if eight:
            self.scales, *refs = refs
        if not dense:
            self.ids, self.counts, self.last_loaded, *refs = refs
        # Outputs: o[B, K, splits, R8, D], lse[B, K, splits, 64], of a selection for older slots too
        # first_attending[B, K, C]. Scratch: three tiles of queries and outputs [64, D], stages
        # [stages, 2 * pages * S, D], maxima and sums[2, 64]; stages of scales [stages, 2 * pages * S], then
        # for each warpgroup keys and values in 16 bits, [pages * S, D] both.
        self.o, self.lse, *refs = refs
        self.first_attending = None if dense or self.q.shape[1] == 1 else refs.pop(0)
        self.q_rows, self.q_tile, self.stages, self.o_tile, self.softmax, *refs = refs
        if eight:
            self.scale_stages, *refs = refs
            self.converted = [(refs.pop(0), refs.pop(0)) for _ in range(blocks.warpgroups)]
        self.q_loaded, self.q_ready, self.ready, self.free, self.other_done = refs
        self.blocks, self.dense, self.eight, self.ring, self.interpret = blocks, dense, eight, ring, interpret
        self.b, self.head, self.split = (lax.axis_index(axis) for axis in ("sequence", "head", "split"))
        self.W, _, self.G, self.D = self.q.shape[1:]
        self.page_rows = self.stages.shape[1] // blocks.pages  # keys, then values
        self.S = self.page_rows // 2
        self.together = dense and self.stages.shape[1] <= self.pages.shape[2]  # pages of a stage, in one copy

        slots = [self.positions[self.b, slot] for slot in range(self.W)]
        self.newest = functools.reduce(jnp.maximum, slots)
        if ring:  # the last place that was written
            self.newest = jnp.minimum(self.newest, jnp.int32(ring.places - 1))
        if dense:
            self.count = lax.div(self.newest + self.S, jnp.int32(self.S))
        else:
            self.count = self.counts[self.b, self.head]
        total = lax.div(self.count + (blocks.pages - 1), jnp.int32(blocks.pages))
        self.first = lax.div(self.split * total, jnp.int32(blocks.splits))
        self.steps = lax.div((self.split + 1) * total, jnp.int32(blocks.splits)) - self.first

    def page_ids(self, step):
        """The pages of a step. Places beyond the last page hold some page, see `there`."""
        place, pages = (self.first + step) * self.blocks.pages, self.blocks.pages
        if self.together:
            start = jnp.minimum(place, self.pages.shape[2] // self.page_rows - pages)
            return [start + j for j in range(pages)]
        places = [jnp.maximum(jnp.minimum(place + j, self.count - 1), 0) for j in range(pages)]
        return places if self.dense else [self.ids[self.b, self.head, place] for place in places]

    def there(self, step, page, j):
        """Whether the j-th page of a step is one to attend to."""
        place = (self.first + step) * self.blocks.pages
        return (page >= place) & (page < self.count) if self.together else place + j < self.count

    def stage_of(self, step):
        """The place of a step in the ring."""
        return lax.rem(step, jnp.int32(self.blocks.stages))

    def load(self):
        """The loading warpgroup. Records the loads of pages that nothing will look up any more."""
        stages = self.blocks.stages

        def attended_pages(step):
            return [] if self.dense else self.page_ids(step)

        def record(pages):
            for page in pages:
                self.last_loaded[self.b, self.head, page] = self.positions[self.b, self.W - 1]

        @pl.loop(jnp.int32(0), self.steps)
        def _(step):
            done = step - stages  # the step whose stage this one takes over
            attended = attended_pages(jnp.maximum(done, 0))
            pl.when(done >= 0)(lambda: plgpu.barrier_wait(self.free.at[self.stage_of(step)]))
            self._copy(self.page_ids(step), self.stage_of(step))
            pl.when(done >= 0)(lambda: record(attended))

        last = [jnp.maximum(self.steps - stages, 0) + i for i in range(stages)]
        attended = [attended_pages(jnp.minimum(step, jnp.maximum(self.steps - 1, 0))) for step in last]
        for step, pages in zip(last, attended, strict=True):

            @pl.when(step < self.steps)
            def _(step=step, pages=pages):
                plgpu.barrier_wait(self.free.at[self.stage_of(step)])
                record(pages)

    def _copy(self, ids, stage):
        rows, ready = self.page_rows, self.ready.at[stage]
        copies = [(self.pages, self.stages, None)]
        if self.eight:
            # A tile must land on a multiple of 128 bytes, and scales of 8 tokens are 64. In bounds, they are
            # no tile but a run of bytes, for which 16 do.
            copies.append((self.scales, self.scale_stages, plgpu.OOBFillMode.PROMISE_IN_BOUNDS))
        for cache, stages, mode in copies:
            source, target = cache.at[self.b, self.head], stages.at[stage]
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=ready, oob_mode=mode)
            if self.together:
                start = pl.multiple_of(ids[0] * rows, rows)
                copy(source.at[pl.ds(start, len(ids) * rows)], target)
                continue
            for j, page in enumerate(ids):
                copy(source.at[pl.ds(page * rows, rows)], target.at[pl.ds(j * rows, rows)])

    def compute(self, turn: int):
        """A computing warpgroup: every step that is its turn, then the output of all."""
        turns = lax.div(self.steps - turn + (self.blocks.warpgroups - 1), jnp.int32(self.blocks.warpgroups))
        nothing = [jnp.int32(0)] * self.blocks.pages
        ids, loads = lax.cond(turns > 0, lambda: self._look_up(turn), lambda: (nothing, nothing))
        acc = plgpu.layout_cast(jnp.zeros((TILE_ROWS, self.D), jnp.float32), plgpu.Layout.WGMMA)
        highest = plgpu.layout_cast(jnp.full((TILE_ROWS,), LOWEST, jnp.float32), PER_ROW)
        norm = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), PER_ROW)
        attend = self._attend(turn)
        self._queries(turn)
        acc, highest, norm, *_ = lax.fori_loop(0, turns, attend, (acc, highest, norm, ids, loads))

        scale = self.D**-0.5 * LOG2E
        if turn == 1:
            self.o_tile[...] = acc
            self.softmax[0], self.softmax[1] = highest, norm
            plgpu.barrier_arrive(self.other_done)
            return
        if self.blocks.warpgroups == 2:
            plgpu.barrier_wait(self.other_done)
            acc, highest, norm = join(acc, highest, norm, self.o_tile, self.softmax, scale)
        seen = norm > 0
        here = self.b, self.head, self.split
        self.lse[here] = jnp.where(seen, highest * scale + jnp.log2(norm), -jnp.inf)
        self.o_tile[...] = acc * lax.broadcast_in_dim(jnp.where(seen, 1 / norm, 0.0), acc.shape, [0])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.o_tile.at[pl.ds(0, self.o.shape[3])], self.o.at[here])
        plgpu.wait_smem_to_gmem(0)

    def _queries(self, turn):
        """Queries of all slots and heads as rows of a tile; rows beyond them hold anything."""
        if turn == 0:

            @pl.loop(jnp.int32(0), jnp.int32(self.W))
            def _(slot):
                rows = self.q_rows.at[pl.ds(slot * self.G, self.G)]
                plgpu.copy_gmem_to_smem(self.q.at[self.b, slot, self.head], rows, self.q_loaded)

            plgpu.barrier_wait(self.q_loaded)
            self.q_tile[...] = plgpu.load(self.q_rows, layout=plgpu.Layout.WGMMA, optimized=False)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.q_ready)
        plgpu.barrier_wait(self.q_ready)

    def _look_up(self, step):
        """The pages of a step and when each was loaded last."""
        ids = self.page_ids(step)
        return ids, ids if self.dense else [self.last_loaded[self.b, self.head, page] for page in ids]

    def _by_row(self, of_position: Callable = lambda position: position):
        """What `of_position` makes of the position of each row's slot; -1 for rows without one."""
        row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=PER_ROW)
        slot_of_row = lax.div(row, jnp.int32(self.G))
        found = plgpu.layout_cast(jnp.full((TILE_ROWS,), -1, jnp.int32), PER_ROW)
        for slot in range(self.W):
            found = jnp.where(slot_of_row == slot, of_position(self.positions[self.b, slot]), found)
        return found

    def _attend(self, turn):
        """One step of flash attention, for `fori_loop`."""
        scale, S = self.D**-0.5 * LOG2E, self.S
        if self.ring:
            # A row sees all that was written, but for the places behind its own, which hold what is newer
            # than its query or older than its window.
            position = self._by_row(lambda position: jnp.where(position >= 0, self.newest, -1))
            behind = self._by_row(lambda position: lax.rem(position + 1, jnp.int32(self.ring.places)))
        else:
            position = self._by_row()
        offset = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS, S), 1, layout=plgpu.Layout.WGMMA)

        def per_column(rows, shape):
            return lax.broadcast_in_dim(rows, shape, [0])

        def visible(room, page):
            seen = offset <= per_column(room, offset.shape)
            if not self.ring:
                return seen
            first = behind - page * S
            end = first + (self.ring.places - self.ring.window)
            first, end, wrapped = (
                per_column(rows, offset.shape) for rows in (first, end, end - self.ring.places)
            )
            return seen & (offset >= wrapped) & ((offset < first) | (offset >= end))

        def attend(index, carry):
            acc, highest, norm, ids, loads = carry
            step = index * self.blocks.warpgroups + turn
            stage = self.stages.at[self.stage_of(step)]

            # Per page, how many of its tokens each row may see.
            rooms = []
            for j, (page, load) in enumerate(zip(ids, loads, strict=True)):
                room = position - jnp.where(self.there(step, page, j), page * S, _NOWHERE)
                rooms.append(room if self.dense else jnp.where(load < position, room, -1))
            if self.first_attending is not None:
                for j, (page, load) in enumerate(zip(ids, loads, strict=True)):
                    place = jnp.minimum((self.first + step) * self.blocks.pages + j, self.count - 1)
                    self.first_attending[self.b, self.head, place] = jnp.maximum(load + 1, page * S)
            unwritten = functools.reduce(jnp.logical_or, [page * S + S - 1 > self.newest for page in ids])
            here = ids
            ids, loads = self._look_up(jnp.minimum(step + self.blocks.warpgroups, self.steps - 1))

            plgpu.barrier_wait(self.ready.at[self.stage_of(step)])
            if self.eight:
                scores, value_scales = self._scores_of_codes(turn, step, here)
            else:
                scores = times_keys(self.q_tile, stage, self.blocks.pages)
            scores = [
                jnp.where(visible(room, page), part, -jnp.inf)
                for room, page, part in zip(rooms, here, scores, strict=True)
            ]
            before = highest
            highest = jnp.maximum(highest, functools.reduce(jnp.maximum, scores).max(axis=1))
            shift = per_column(highest * scale, offset.shape)
            weights = [jnp.exp2(part * scale - shift) for part in scores]
            decay = jnp.exp2((before - highest) * scale)
            norm = norm * decay + functools.reduce(jnp.add, weights).sum(axis=1)
            if self.eight:
                weights = [part * by for part, by in zip(weights, value_scales, strict=True)]
            weights = [part.astype(self.q_tile.dtype) for part in weights]
            acc = acc * per_column(decay, acc.shape)
            if self.eight:
                weights = jnp.concatenate(weights, axis=1)
                acc = add_product(acc, weights, self.converted[turn][VALUES], self.interpret)
                return acc, highest, norm, ids, loads

            @pl.when(unwritten)
            def _():  # what lies beyond the newest position may be NaN, and 0 * NaN is NaN
                clear_unwritten(stage, here, self.newest)

            acc = add_values(acc, weights, stage, self.interpret)
            plgpu.barrier_arrive(self.free.at[self.stage_of(step)])
            return acc, highest, norm, ids, loads

        return attend

    def _scores_of_codes(self, turn, step, ids):
        """Logits of a step's keys in 8 bits and the scales of its values; the stage is free after that."""
        stage, S = self.stage_of(step), self.S
        tokens = [self.newest + 1 - page * S for page in ids]
        scores = times_codes(self.q_tile, self.stages.at[stage], *self.converted[turn], tokens)
        offset = plgpu.broadcasted_iota(jnp.int32, (S,), 0, layout=PER_COLUMN)
        parts, value_scales = [], []
        for j, (part, written) in enumerate(zip(scores, tokens, strict=True)):
            by_key, by_value = (
                plgpu.load(
                    self.scale_stages.at[stage, pl.ds((2 * j + half) * S, S)],
                    layout=PER_COLUMN,
                    optimized=False,
                )
                for half in (KEYS, VALUES)
            )
            parts.append(part * lax.broadcast_in_dim(by_key, part.shape, [1]))
            by_value = jnp.where(offset < written, by_value, 0.0)  # others may be NaN
            value_scales.append(lax.broadcast_in_dim(by_value, part.shape, [1]))
        plgpu.barrier_arrive(self.free.at[stage])
        return parts, value_scales
