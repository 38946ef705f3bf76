"""The scales of pages in 8 bits, as the TPU kernels of attention take them.

XLA lays `scales[B, K, P, 2, S]` out with pages along the lanes, so that the scales of a page are a column and
no copy brings those of fewer than 128 pages. So those of all written pages of an item come at once, while the
item before it is attended to: 8 bytes for each token of the context, beside 2 D for each that is loaded. They
are transposed once, so that those of a page are a row, which is what scores want: tokens along the lanes.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, SUBLANES


def by_lanes(scales, whole: bool):
    """Scales [B, K, P, 2, S] with pages as the last axis, which is how XLA has them in memory.

    Args:
      scales: of pages.
      whole: whether to pad pages to whole lanes, which memory has, but not the interpreter's; fewer than
        those of one register always are.
    """
    scales = jnp.moveaxis(scales, 2, -1)
    pad = -scales.shape[-1] % LANES if whole or scales.shape[-1] < LANES else 0
    return jnp.pad(scales, [(0, 0)] * 4 + [(0, pad)])


def scale_bytes(P: int, page_size: int) -> int:
    """Bytes of VMEM: the scales of an item as they come, and transposed."""
    pages = -(-P // LANES) * LANES + SUBLANES
    return pages * (2 * page_size + LANES) * 4


class Scales:
    """The scales of a stream's items.

    Args:
      scales: in HBM, [B, K, 2, S, P].
      scratch: what `scratch` asked for.
    """

    def __init__(self, scales, scratch):
        self.scales, self.S = scales, scales.shape[3]
        self.fresh, self.rows, self.arrived = scratch

    @staticmethod
    def scratch(P: int, S: int) -> list:
        """The memory that they come to."""
        chunks = -(-P // LANES)
        return [
            pltpu.VMEM((chunks, 2, S, LANES), jnp.float32),
            pltpu.VMEM((chunks * LANES + SUBLANES, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ]

    def start(self, item):
        """Has those of an item's written pages copied; those of the item before must be transposed."""

        @pl.loop(0, self._chunks(item))
        def _(chunk):
            pages = pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)
            source = self.scales.at[item.b, item.head, :, :, pages]
            pltpu.make_async_copy(source, self.fresh.at[chunk], self.arrived).start()

    def wait(self, item):
        """Waits for those of an item."""
        there = self.fresh.at[pl.ds(0, self._chunks(item))]
        pl.when(self._chunks(item) > 0)(pltpu.make_async_copy(there, there, self.arrived).wait)

    def transpose(self, item):
        """Makes rows of those that arrived; those of unwritten tokens, which may be NaN, become 0."""

        @pl.loop(0, self._chunks(item))
        def _(chunk):
            scales = self.fresh[chunk]
            token, lane = (lax.broadcasted_iota(jnp.int32, scales.shape, axis) for axis in (1, 2))
            first = pl.multiple_of(chunk * LANES, LANES)
            scales = jnp.where((first + lane) * self.S + token <= item.newest, scales, 0.0)
            self.rows[pl.ds(first, LANES), pl.ds(0, 2 * self.S)] = scales.reshape(-1, LANES).T

        self.rows[pl.ds(self._newest_page(item) + 1, 1)] = jnp.zeros((1, LANES), jnp.float32)

    def of(self, item, pages):
        """The scales of keys and of values of some pages, whose tokens fill the lanes: two [1, 128].

        Args:
          item: whose they are.
          pages: their numbers; of those beyond the newest, scales are 0.
        """
        S, count = self.S, len(pages)
        beyond = (self._newest_page(item) + 1).astype(jnp.uint32)  # unsigned, the minimum is one instruction
        pages = [jnp.minimum(page.astype(jnp.uint32), beyond).astype(jnp.int32) for page in pages]
        rows = [self.rows[pl.ds(page, 1)] for page in pages]
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        keys = values = jnp.zeros((1, LANES), jnp.float32)
        for j, row in enumerate(rows):
            row = pltpu.roll(row, j * S, 1) if j else row
            keys = jnp.where(lane // S == j, row, keys)
            values = jnp.where(lane // S == (j + 1) % count, row, values)
        return keys, pltpu.roll(values, LANES - S, 1)

    def _newest_page(self, item):
        return jnp.clip(lax.div(item.newest, jnp.int32(self.S)), 0, self.fresh.shape[0] * LANES - 1)

    def _chunks(self, item):
        """How many registers' lanes the written pages of an item take; none if it loads no page."""
        chunks = lax.div(self._newest_page(item), jnp.int32(LANES)) + 1
        return jnp.where(item.count > 0, chunks, 0)
