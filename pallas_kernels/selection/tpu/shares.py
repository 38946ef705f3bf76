"""Shares of attention on a TPU: softmaxes over logits that stay in VMEM, and their mean over a group.

Logits of a tile of 128 pages lie a query head of the group to a register, where each KV head has a sublane:
[tiles * G * 8, 128]. So all KV heads are served at once, and only a maximum and a sum for each query head
of a group go across lanes.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selection.tpu.choice import CHUNK
from pallas_kernels.tpu import LANES, SUBLANES

_LOWEST = -1e30
"""The logit of what is no page before the newest: finite, so that its difference to itself is not NaN."""


def shares(keys_ref, logits_ref, newest, group):
    """Writes the bits of each page's mean share of attention; see `pallas_kernels.scores.attention_weights`.

    Args:
      keys_ref: out, [tiles * 8, 128]; of the chunks up to the newest page's.
      logits_ref: logits[tiles * group * 8, 128] of the pages up to the newest, others arbitrary; changed.
      newest: the last page, of which no query has a share.
      group: query heads of a KV head.
    """
    chunks = lax.div(jnp.maximum(newest, 0), jnp.int32(CHUNK * LANES)) + 1
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def rows(place):
        return pl.ds(pl.multiple_of(place * SUBLANES, SUBLANES), SUBLANES)

    def for_tiles(head, step, start):
        """Folds `step(carry, tile, rows of its logits, which of its pages are before the newest)`."""

        def turn(chunk, carry):
            for tile in range(CHUNK):
                tile += chunk * CHUNK
                carry = step(carry, tile, rows(tile * group + head), lane + tile * LANES < newest)
            return carry

        return lax.fori_loop(0, chunks, turn, start)

    def of_head(head, _):
        def maximum(highest, _, here, before):
            return jnp.maximum(highest, jnp.where(before, logits_ref[here], _LOWEST))

        highest = for_tiles(head, maximum, jnp.full((SUBLANES, LANES), _LOWEST))
        highest = jnp.broadcast_to(jnp.max(highest, axis=1, keepdims=True), highest.shape)

        def power(total, _, here, before):
            powers = jnp.where(before, jnp.exp(logits_ref[here] - highest), 0.0)
            logits_ref[here] = powers
            return total + powers

        total = jnp.sum(for_tiles(head, power, jnp.zeros((SUBLANES, LANES))), axis=1, keepdims=True) * group
        inverse = jnp.broadcast_to(1 / jnp.where(total == 0.0, 1.0, total), highest.shape)

        def add(_, tile, here, before):
            others = jnp.where(head == 0, 0.0, pltpu.bitcast(keys_ref[rows(tile)], jnp.float32))
            keys_ref[rows(tile)] = pltpu.bitcast(others + logits_ref[here] * inverse, jnp.int32)

        for_tiles(head, add, None)

    lax.fori_loop(0, group, of_head, None)
