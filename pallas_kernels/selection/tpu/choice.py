"""The set of the best pages on a TPU: for several KV heads at once, in vector registers from end to end.

Scores lie a KV head to a sublane, 128 pages of it along the lanes: [tiles * 8, 128]. A search in base 8 over
the bits of the scores finds the budget's last one. Prefix sums, which are products with a triangle of ones,
then say how many pages before each one were chosen. Last, every place of the result looks up its page: first
the tile whose range of places it lies in, then the lane.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, SUBLANES

CHUNK = 8
"""Tiles of 128 pages that are looked at together; there are a multiple of it."""
_ROWS = CHUNK * SUBLANES
_BITS = 3  # that a pass of the search decides
_LOWEST = -(2**31)
_FORCED = 0x7F800000  # infinity


def scratch_of(heads, tiles):
    """Memory that `choose` needs: keys, chosen, upto, ranks; `keys` comes with the bits of the scores."""
    return [
        pltpu.VMEM((tiles * SUBLANES, LANES), jnp.int32),
        pltpu.VMEM((tiles * SUBLANES, LANES), jnp.float32),
        pltpu.VMEM((tiles * SUBLANES, LANES), jnp.float32),
        pltpu.VMEM((heads, LANES, tiles), jnp.bfloat16),
    ]


def choose(ids_ref, keys_ref, chosen_ref, upto_ref, ranks_ref, newest, budget, heads, sink_pages):
    """Writes the budget's best pages in ascending order, ties to the lower page.

    Args:
      ids_ref: page_ids[heads, places], places a multiple of 128; 0 beyond the budget.
      keys_ref: the bits of the scores.
      chosen_ref: scratch.
      upto_ref: scratch.
      ranks_ref: scratch.
      newest: the last page.
      budget: how many to choose, at most newest + 1.
      heads: KV heads, at most 8.
      sink_pages: how many of the first pages are always chosen, as the newest is.
    """
    _order(keys_ref, newest, sink_pages)
    threshold = _search(keys_ref, newest, budget, heads)
    (above,) = _count(keys_ref, [threshold + 1], newest)
    _mark(keys_ref, chosen_ref, upto_ref, threshold, above, budget)
    _look_up(ids_ref, chosen_ref, upto_ref, ranks_ref, budget, heads)


def _chunk(index):
    return pl.ds(pl.multiple_of(index * _ROWS, _ROWS), _ROWS)


def _order(keys_ref, newest, sink_pages):
    """Makes the bits of scores integers of the same order; forced pages highest, what is no page lowest."""
    row = lax.broadcasted_iota(jnp.int32, (_ROWS, LANES), 0)
    place = row // SUBLANES * LANES + lax.broadcasted_iota(jnp.int32, (_ROWS, LANES), 1)

    def order(index, _):
        bits = keys_ref[_chunk(index)]
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        page = place + index * (CHUNK * LANES)
        key = jnp.where((page < sink_pages) | (page == newest), _FORCED, key)
        keys_ref[_chunk(index)] = jnp.where(page <= newest, key, _LOWEST)

    lax.fori_loop(0, keys_ref.shape[0] // _ROWS, order, None)


def _wide(values):
    """[8, 1] to a register, [8, 128]."""
    return jnp.broadcast_to(values, (SUBLANES, LANES))


def _count(keys_ref, steps, newest):
    """How many pages have a key of `step` or more: [8, 1] for each of `steps`[8, 1]."""
    chunks = lax.div(newest, jnp.int32(CHUNK * LANES)) + 1
    steps = [_wide(step) for step in steps]

    def count(index, totals):
        totals = list(totals)
        for tile in range(CHUNK):
            keys = keys_ref[pl.ds(pl.multiple_of(index * _ROWS, _ROWS) + tile * SUBLANES, SUBLANES)]
            for place, step in enumerate(steps):
                totals[place] += jnp.where(keys >= step, 1.0, 0.0)
        return totals

    totals = lax.fori_loop(0, chunks, count, [jnp.zeros((SUBLANES, LANES))] * len(steps))
    return [jnp.sum(total, axis=1, keepdims=True) for total in totals]


def _search(keys_ref, newest, budget, heads):
    """Per head, the key [8, 1] above which lie no more pages than the budget, and at or above it no fewer."""
    head = lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)

    def narrow(carry):
        threshold, shift, _ = carry
        counts = _count(
            keys_ref, [threshold + (jnp.int32(digit) << shift) for digit in range(1, 2**_BITS)], newest
        )
        digit = sum((count >= budget).astype(jnp.int32) for count in counts)
        exact = sum((count == budget).astype(jnp.int32) for count in counts)
        undecided = jnp.max(jnp.where((head < heads) & (exact == 0), 1, 0))
        left = jnp.where(shift > 0, undecided, 0)
        return threshold + (digit << shift), jnp.maximum(shift - _BITS, 0), left

    carry = jnp.full((SUBLANES, 1), _LOWEST, jnp.int32), jnp.int32(32 - _BITS), jnp.int32(1)
    return lax.while_loop(lambda carry: carry[2] > 0, narrow, carry)[0]


def _triangle(before):
    """Ones where `before(row, column)`, [128, 128]."""
    row = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    return before(row, lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)).astype(jnp.bfloat16)


def _product(a, b, contract=0):
    """The matrix product of a and b, or b.T with `contract` 1; exact for whole numbers up to 256."""
    return lax.dot_general(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        (((1,), (contract,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _mark(keys_ref, chosen_ref, upto_ref, threshold, above, budget):
    """Writes 1 to `chosen` for chosen pages, and to all lanes of a tile in `upto` how many up to its end."""
    threshold = jnp.concatenate([_wide(threshold)] * CHUNK)
    wanted = jnp.concatenate([_wide(budget.astype(jnp.float32) - above)] * CHUNK)  # ties at the threshold
    sums = jnp.concatenate([_triangle(jnp.less_equal), jnp.ones((LANES, LANES), jnp.bfloat16)], axis=1)

    def along_tiles(carry, totals):
        """Running sums over the tiles of a chunk, [64, 128], and the last."""
        running = []
        for tile in range(CHUNK):
            carry += totals[tile * SUBLANES : (tile + 1) * SUBLANES]
            running.append(carry)
        return carry, jnp.concatenate(running)

    def mark(index, carry):
        ties, upto = carry
        keys = keys_ref[_chunk(index)]
        tie = (keys == threshold).astype(jnp.float32)
        counted = _product(tie, sums)
        within, total = counted[:, :LANES], counted[:, LANES:]
        ties, after = along_tiles(ties, total)
        few = after - total + within <= wanted
        chosen = jnp.where((keys > threshold) | ((tie > 0) & few), 1.0, 0.0)
        upto, after = along_tiles(upto, _product(chosen, sums[:, LANES:]))
        chosen_ref[_chunk(index)] = chosen
        upto_ref[_chunk(index)] = after
        return ties, upto

    zero = jnp.zeros((SUBLANES, LANES))
    lax.fori_loop(0, keys_ref.shape[0] // _ROWS, mark, (zero, zero))


def _look_up(ids_ref, chosen_ref, upto_ref, ranks_ref, budget, heads):
    """Writes the page for each place of the result, 128 at once: those of a tile follow each other."""
    tiles = chosen_ref.shape[0] // SUBLANES
    triangle = _triangle(jnp.greater_equal)
    for head in range(heads):
        ranks = _product(triangle, chosen_ref[pl.ds(head, tiles, stride=SUBLANES)], contract=1)
        ranks_ref[head] = ranks.astype(jnp.bfloat16)  # [lane, tile]: how many of the tile up to this lane
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = lax.broadcasted_iota(jnp.int32, (tiles, LANES), 0).astype(jnp.float32)

    def look_up(index, _):
        place = index * LANES + lane
        for head in range(heads):
            upto = upto_ref[pl.ds(head, tiles, stride=SUBLANES)]
            passed = upto <= place.astype(jnp.float32)
            tile = jnp.sum(passed.astype(jnp.float32), axis=0, keepdims=True)
            before = jnp.max(jnp.where(passed, upto, 0.0), axis=0, keepdims=True)
            ranks = _product(ranks_ref[head], (row == tile).astype(jnp.float32))
            within = (ranks <= place.astype(jnp.float32) - before).astype(jnp.float32)
            page = tile * LANES + jnp.sum(within, axis=0, keepdims=True)
            ids_ref[head : head + 1, pl.ds(pl.multiple_of(index * LANES, LANES), LANES)] = jnp.where(
                place < budget, page.astype(jnp.int32), 0
            )

    lax.fori_loop(0, ids_ref.shape[1] // LANES, look_up, None)
