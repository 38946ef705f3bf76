"""The stream of pages that a TPU core attends to: one block after the other, across all its items.

An item is a sequence and KV head. Its page ids and its row of last_loaded lie in scalar memory while its
pages are issued: a copy for each page, which brings keys and values. One wait takes a whole block, since a
semaphore counts what arrived. Blocks of the next item are issued while the last ones of this are attended to.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.blocks import ROWS, Blocks, row_sizes
from pallas_kernels.attention.tpu.scales import Scales
from pallas_kernels.layout import VALUES
from pallas_kernels.pages import QuantizedPages
from pallas_kernels.tpu import LANES, SUBLANES


def group_of(blocks: Blocks) -> int:
    """Pages whose highest is noted together, to find those that reach beyond the newest position."""
    return math.gcd(blocks.pages, 8)


class PageStream:
    """What the body of the kernel sees of it.

    Args:
      pages: in HBM, [B, K, P, 2, S, D].
      scales: in HBM, of pages in 8 bits (`Scales`), else None.
      positions: in SMEM, [B, W].
      selection: page_ids[B, K, C] in HBM, counts[B, K] in SMEM and last_loaded[B, K, P] in HBM, which is
        updated; or None for all pages up to the newest position.
      scratch: what `scratch` asked for.
      blocks: how the work is cut.
    """

    def __init__(self, pages, scales, positions, selection, scratch, blocks: Blocks):
        self.pages, self.positions, self.blocks = pages, positions, blocks
        self.dense, self.scales = selection is None, None
        self.may_be_nan = jnp.issubdtype(pages.dtype, jnp.floating)  # what nobody wrote
        if scales is not None:
            self.scales = Scales(scales, scratch[-3:])
            scratch = scratch[:-3]
        self.buffer, self.arrived, self.next_slot, *scratch = scratch
        if not self.dense:
            self.page_ids, self.counts, self.last_loaded = selection
            self.furthest, self.all_ids, self.all_loaded, self.row_arrived, self.row_left = scratch
        self.K, self.P, _, self.S, _ = pages.shape[1:]
        self.slots, self.group = blocks.ahead + 1, group_of(blocks)
        core, self.step = pl.program_id(0), pl.program_id(1)
        self.steps = pl.num_programs(1)
        self.first = core * self.steps
        self.item = Item(self, self.step)
        self.next = Item(self, jnp.minimum(self.step + 1, self.steps - 1), self.step + 1 < self.steps)

    @staticmethod
    def scratch(blocks: Blocks, pages, selection) -> list:
        """The memory that a stream works in."""
        P, _, S, D = pages.shape[2:]
        slots = blocks.ahead + 1
        common = [
            pltpu.VMEM((slots, blocks.pages, 2, S, D), pages.dtype),
            pltpu.SemaphoreType.DMA((slots,)),
            pltpu.SMEM((1,), jnp.int32),
        ]
        scales = Scales.scratch(P, S) if isinstance(pages, QuantizedPages) else []
        if selection is None:
            return common + scales
        groups = blocks.pages // group_of(blocks)
        return [
            *common,
            pltpu.SMEM((slots * (groups + 1),), jnp.int32),
            *(pltpu.SMEM((ROWS * size,), jnp.int32) for size in row_sizes(blocks, selection[0].shape[-1], P)),
            pltpu.SemaphoreType.DMA((ROWS, 2)),
            pltpu.SemaphoreType.DMA((ROWS,)),
            *scales,
        ]

    def begin(self):
        """Has the item's first blocks issued; the number of its blocks."""

        @pl.when(self.step == 0)
        def _():
            self.next_slot[0] = 0
            if self.scales is not None:
                self.scales.start(self.item)
            self._start_rows(self.item)
            self._wait_for_rows(self.item)

            @pl.loop(0, self.slots)
            def _(slot):
                # What a block lacks at the end of an item has weight 0, and 0 * NaN is NaN: let it be finite.
                partial = self._pages_of(self.item, slot) < self.blocks.pages
                pl.when(partial & self.may_be_nan)(lambda: self._clear_slot(slot))
                issued = (slot < self.blocks.ahead) & (slot < self.item.blocks)
                pl.when(issued)(lambda: self._issue(self.item, slot, slot))

        self.base = self.next_slot[0]
        self.count = self.item.blocks
        pl.when(self.next.exists)(lambda: self._start_rows(self.next))
        # A short item leaves room for more of the next one.
        early = jnp.maximum(self.blocks.ahead - self.count, 0)

        @pl.when(self.next.exists & (early > 0))
        def _():
            self._wait_for_rows(self.next)

            @pl.loop(0, jnp.minimum(early, self.next.blocks))
            def _(index):
                self._issue(self.next, index, self._slot(self.count + index))

        if self.scales is not None:
            self.scales.wait(self.item)
            self.scales.transpose(self.item)
            pl.when(self.next.exists)(lambda: self.scales.start(self.next))
        return self.count

    def next_block(self, index):
        """Waits for a block of the item: a Ref[pages, 2, S, D]."""
        slot = self._slot(index)
        self._wait(index, slot)
        if self.may_be_nan:
            self._clear_unwritten(index, slot)
        wanted = index + self.blocks.ahead == self.count
        pl.when(self.next.exists & wanted)(lambda: self._wait_for_rows(self.next))
        return self.buffer.at[slot]

    def numbers(self, block, which, dtype):
        """Keys or values [tokens, D] of a block that `next_block` returned; of 8 bits codes in `dtype`."""
        if self.scales is None:
            return block[:, which].reshape(-1, block.shape[-1])
        return block[:, which].astype(jnp.float32).reshape(-1, block.shape[-1]).astype(dtype)

    def issue_ahead(self, index):
        """Issues the block that takes the place of the predecessor of block `index`."""
        ahead = index + self.blocks.ahead
        of_next = ahead >= self.count
        item = self.item.or_else(of_next, self.next)
        self._issue(item, jnp.where(of_next, ahead - self.count, ahead), self._slot(ahead))

    def end(self):
        """Hands over to the next item, and has last_loaded written back."""
        self.next_slot[0] = self._slot(self.count)
        if self.dense:
            return
        self._row_out(self.item).start()
        previous = Item(self, jnp.maximum(self.step - 1, 0))
        pl.when(self.step > 0)(lambda: self._row_out(previous).wait())
        pl.when(self.step == self.steps - 1)(lambda: self._row_out(self.item).wait())

    def _slot(self, index):
        """The place in the ring of the item's block `index`, or of those that follow it."""
        return lax.rem(self.base + index, self.slots)

    def _pages_of(self, item, index):
        return jnp.clip(item.count - index * self.blocks.pages, 0, self.blocks.pages)

    def _wait(self, index, slot):
        many = pl.ds(0, self._pages_of(self.item, index))
        block = self.buffer.at[slot, many]
        pltpu.make_async_copy(self.pages.at[0, 0, many], block, self.arrived.at[slot]).wait()

    def _clear_slot(self, slot):
        @pl.loop(0, self.blocks.pages)
        def _(j):
            self.buffer[slot, j] = jnp.zeros(self.buffer.shape[2:], self.buffer.dtype)

    def _issue(self, item, index, slot):
        """Has the pages of a block copied; none if the item has no such block."""
        if self.dense:
            self._issue_run(item, index, slot)
        else:
            self._issue_pages(item, index, slot)

    def _issue_run(self, item, index, slot):
        """Consecutive pages are one copy."""
        count = self._pages_of(item, index)
        source = self.pages.at[item.b, item.head, pl.ds(index * self.blocks.pages, count)]
        copy = pltpu.make_async_copy(source, self.buffer.at[slot, pl.ds(0, count)], self.arrived.at[slot])
        pl.when(count > 0)(copy.start)

    def _issue_pages(self, item, index, slot):
        """A copy for each page."""
        ids, target, arrived = self._ids(item), self.buffer.at[slot], self.arrived.at[slot]
        source = self.pages.at[item.b, item.head]
        there = self._pages_of(item, index) > 0
        start = jnp.where(there, index * self.blocks.pages, ids.shape[0] - self.blocks.pages)
        furthest = []  # of each group
        for j in range(self.blocks.pages):
            page = ids[start + j]
            if j % self.group == 0:
                furthest.append(jnp.uint32(0))  # unsigned, the maximum is one instruction
            furthest[-1] = jnp.maximum(furthest[-1], page.astype(jnp.uint32))
            pl.when(page < self.P)(pltpu.make_async_copy(source.at[page], target.at[j], arrived).start)
        if not self.may_be_nan:
            return
        for group, page in enumerate([*furthest, functools.reduce(jnp.maximum, furthest)]):
            self.furthest[slot * (len(furthest) + 1) + group] = page.astype(jnp.int32)

    def along_tokens(self, index):
        """What is to be known of each token of a block, along the lanes. Records the load of the pages.

        Returns:
          The position beyond which a slot sees it, in all sublanes: after its page was last loaded, and not
          before the token. And the scales of keys and of values, each [1, tokens]; None of pages without.
        """
        together = max(LANES // self.S, 1)  # pages whose tokens fill the lanes
        ids, loaded = (None, None) if self.dense else (self._ids(self.item), self._loaded(self.item))
        step = self.positions[self.item.b, self.positions.shape[1] - 1]  # of the newest slot
        shape = SUBLANES, LANES
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        horizon, scales = [], []
        for first in range(0, self.blocks.pages, together):
            pages = [index * self.blocks.pages + j for j in range(first, first + together)]
            if self.dense:
                horizon.append(pages[0] * self.S - 1 + lane)
            else:
                page_of, loaded_of = (jnp.zeros(shape, jnp.int32) for _ in range(2))
                for j, place in enumerate(pages):
                    pages[j] = page = ids[place]
                    before = loaded[page]
                    loaded[page] = step
                    page_of = jnp.where(lane >= j * self.S, page, page_of)
                    loaded_of = jnp.where(lane >= j * self.S, before, loaded_of)
                before_token = page_of * self.S + lane % self.S - 1
                horizon.append(jnp.maximum(before_token, loaded_of))
            if self.scales is not None:
                scales.append(self.scales.of(self.item, pages))
        joined = [jnp.concatenate(parts, axis=1) for parts in (horizon, *zip(*scales, strict=True))]
        return joined if scales else (*joined, None, None)

    def _clear_unwritten(self, index, slot):
        """Zeroes values beyond the newest position, which may be NaN: 0 * NaN is NaN."""
        groups = self.blocks.pages // self.group

        def reaches_beyond(group):
            if self.dense:
                page = (
                    index * self.blocks.pages + jnp.minimum((group + 1) * self.group, self.blocks.pages) - 1
                )
            else:
                page = self.furthest[slot * (groups + 1) + group]
            return page * self.S + self.S - 1 > self.item.newest

        @pl.when(reaches_beyond(groups))
        def _():
            @pl.loop(0, groups)
            def _(group):
                first = group * self.group
                last = jnp.minimum(first + self.group, self._pages_of(self.item, index))

                @pl.when(reaches_beyond(group))
                def _():
                    pl.loop(first, last)(lambda j: self._clear_page(index, slot, j))

    def _clear_page(self, index, slot, j):
        """Zeroes what is unwritten of the j-th page of a block."""
        page = index * self.blocks.pages + j
        if not self.dense:
            page = self._ids(self.item)[page]
        room = self.item.newest - page * self.S

        @pl.when(room < self.S - 1)
        def _():
            values = self.buffer.at[slot, j, VALUES]
            token = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values[...] = jnp.where(token <= room, values[...], 0)

    def _ids(self, item):
        """The item's page ids; to the end of its last block, and in a block beyond, no page (P)."""
        return self._row(self.all_ids, item)

    def _loaded(self, item):
        """The item's last_loaded, and an entry for no page."""
        return self._row(self.all_loaded, item)

    def _row(self, ref, item):
        size = ref.shape[0] // ROWS
        return ref.at[pl.ds(pl.multiple_of(item.row * size, LANES), size)]

    def _rows(self, item):
        """The copies of an item's page ids and last_loaded to scalar memory."""
        ids = self._ids(item).at[pl.ds(0, self.page_ids.shape[-1])]
        loaded = self._loaded(item).at[pl.ds(0, self.last_loaded.shape[-1])]
        arrived = self.row_arrived.at[item.row]
        return (
            pltpu.make_async_copy(self.page_ids.at[item.b, item.head], ids, arrived.at[0]),
            pltpu.make_async_copy(self.last_loaded.at[item.b, item.head], loaded, arrived.at[1]),
        )

    def _row_out(self, item):
        target = self.last_loaded.at[item.b, item.head]
        source = self._loaded(item).at[pl.ds(0, target.shape[0])]
        return pltpu.make_async_copy(source, target, self.row_left.at[item.row])

    def _start_rows(self, item):
        if not self.dense:
            for copy in self._rows(item):
                copy.start()

    def _wait_for_rows(self, item):
        if self.dense:
            return
        for copy in self._rows(item):
            copy.wait()
        ids, pages = self._ids(item), self.blocks.pages
        for j in range(pages):
            ids[item.count + j] = self.P
            ids[ids.shape[0] - pages + j] = self.P


class Item:
    """A sequence and KV head: run-time scalars.

    Args:
      stream: whose step it is.
      step: of the stream's core.
      exists: whether it is one; if not, it has no pages.
    """

    def __init__(self, stream: PageStream, step, exists=True):
        index = stream.first + step
        self.exists = exists
        self.b, self.head = lax.div(index, jnp.int32(stream.K)), lax.rem(index, jnp.int32(stream.K))
        self.row = lax.rem(step, jnp.int32(ROWS))
        slots = [stream.positions[self.b, slot] for slot in range(stream.positions.shape[1])]
        self.newest = functools.reduce(jnp.maximum, slots)
        if stream.dense:
            count = lax.div(self.newest + stream.S, jnp.int32(stream.S))
        else:
            count = stream.counts[self.b, self.head]
        self.count = jnp.where(exists, count, 0)
        self.blocks = lax.div(self.count + (stream.blocks.pages - 1), jnp.int32(stream.blocks.pages))

    def or_else(self, condition, other: "Item") -> "Item":
        """The other item if the condition holds."""
        item = object.__new__(Item)
        for name in ("b", "head", "row", "newest", "count", "blocks"):
            setattr(item, name, jnp.where(condition, getattr(other, name), getattr(self, name)))
        return item
