"""Page update on TPUs, in place: copies the touched pages to VMEM, changes rows, copies them back with statistics.

A page of all KV heads comes in one copy. The copies of all sequences of a grid step are in flight together,
since at a few tokens it is latency that counts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS
from pallas_kernels.operation import operation
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip

MAX_TOKENS = 32
"""Tokens of one update: each is looked for in every row of the touched pages."""


@operation
def update_pages(
    pages: Float[Array, "B K P 2 S D"],
    statistics: Float[Array, "B K P Z D"] | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    kind: str,
    interpret: Any = False,
) -> tuple[Float[Array, "B K P 2 S D"], Float[Array, "B K P Z D"] | None]:
    """See `pallas_kernels.update.api.update_pages`."""
    B, T, K, D = k.shape
    P, _, S = pages.shape[2:5]
    check_support("update_pages", pages.dtype, D, S)
    if T > MAX_TOKENS:
        raise NotImplementedError(
            f"update_pages: {T} tokens are more than the Mosaic TPU kernel's {MAX_TOKENS}"
        )
    # One vector per page: pages become the rows, which is how XLA lays the array out. Their copies are of 8 rows.
    rows = 1 if statistics is None or statistics.shape[3] == 2 else SUBLANES
    if P % rows:
        raise NotImplementedError(
            f"update_pages: {P} pages are not a multiple of {rows}, as the Mosaic TPU kernel needs "
            f"for {kind!r} statistics"
        )
    touched = (T + S - 2) // S + 1
    slices = (touched + rows - 2) // rows + 1

    target = chip()
    lanes = max(D, LANES) * pages.dtype.itemsize
    page_bytes, slice_bytes = 2 * K * S * lanes, K * max(rows, 2) * lanes
    token_bytes = 4 * T * -(-K // SUBLANES) * SUBLANES * lanes
    sequence_bytes = touched * page_bytes + slices * slice_bytes + token_bytes
    together = _sequences_per_step(B, sequence_bytes, target)
    check_memory("update_pages", target, vmem=together * sequence_bytes, smem=4 * B * (T + 1) + 4096)

    scratch = [pltpu.VMEM((together, touched, K, 2, S, D), pages.dtype)]
    state = [pages]
    if statistics is not None:
        shape = (K, 2, D) if rows == 1 else (K, rows, D)
        scratch.append(pltpu.VMEM((together, slices, *shape), pages.dtype))
        state.append(statistics if rows == 1 else statistics.reshape(B, K, P, D))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens = pl.BlockSpec((together, T, K, D), lambda step, *_: (step, 0, 0, 0))
    launch = pl.pallas_call(
        lambda *refs: _body(refs, together, touched, slices, rows, kind),
        name="update_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B // together,),
            in_specs=[tokens, tokens] + [hbm] * len(state),
            out_specs=[hbm] * len(state),
            scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in state],
        input_output_aliases={4 + index: index for index in range(len(state))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=target.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=B * (2 * touched * page_bytes + 2 * slices * slice_bytes + token_bytes // 2),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    pages, *rest = launch(start, write.astype(jnp.int32), k, v, *state)
    return pages, None if statistics is None else rest[0].reshape(statistics.shape)


def _sequences_per_step(batch, sequence_bytes, target):
    """How many sequences fit VMEM at once, but no core goes without."""
    fit = [count for count in range(1, batch + 1) if batch % count == 0 and count * sequence_bytes <= target.vmem]
    return max([count for count in fit if batch // count % target.cores == 0], default=max(fit, default=1))


def _body(refs, together, touched, slices, rows, kind):
    start_ref, write_ref, k_ref, v_ref, *refs = refs
    *refs, arrived = refs
    if len(refs) == 3:
        _, pages_ref, buffer_ref = refs
        statistics_ref = rows_ref = None
    else:
        _, _, pages_ref, statistics_ref, buffer_ref, rows_ref = refs
    T, S, P = k_ref.shape[1], pages_ref.shape[4], pages_ref.shape[2]

    def span(index):
        """A sequence, its start and end, and its first touched page and the one after the last."""
        b = pl.program_id(0) * together + index
        start, end = start_ref[b], jnp.int32(0)
        for t in range(T):
            end = jnp.where(write_ref[b, t] > 0, start + t + 1, end)
        first = jnp.maximum(lax.div(start + P * S, jnp.int32(S)) - P, 0)  # rounds down where start is negative
        last = jnp.minimum(lax.div(end + (S - 1), jnp.int32(S)), P)
        return b, start, end, first, jnp.where(end > 0, last, first)

    def for_pages(index, step):
        """Calls `step(page, slot)` for a sequence's touched pages; slots count from 0."""
        _, _, _, first, last = span(index)
        lax.fori_loop(first, last, lambda page, _: step(page, page - first), None)

    def copies(index, act, back):
        """Starts or waits for the copies of a sequence, to VMEM or back."""
        b, _, _, first, last = span(index)

        def transfer(ref, place, buffer):
            pair = (buffer, ref.at[b, :, place]) if back else (ref.at[b, :, place], buffer)
            act(pltpu.make_async_copy(*pair, arrived))

        for_pages(index, lambda page, slot: transfer(pages_ref, page, buffer_ref.at[index, slot]))
        if statistics_ref is None:
            return
        if rows == 1:
            if back:
                for_pages(index, lambda page, slot: transfer(statistics_ref, page, rows_ref.at[index, slot]))
            return
        lowest = lax.div(first, jnp.int32(rows))

        def transfer_slice(number, _):
            place = pl.ds(pl.multiple_of(number * rows, rows), rows)
            transfer(statistics_ref, place, rows_ref.at[index, number - lowest])

        number = lax.div(last + (rows - 1), jnp.int32(rows))
        lax.fori_loop(lowest, jnp.where(last > first, number, lowest), transfer_slice, None)

    def change(index):
        b, start, end, first, _ = span(index)

        def change_page(page, slot):
            entries = [ref[index].astype(jnp.float32) for ref in (k_ref, v_ref)]
            row = lax.broadcasted_iota(jnp.int32, pages_ref.shape[4:], 0) + page * S
            here = [(row == start + t) & (write_ref[b, t] > 0) for t in range(T)]
            for head in range(pages_ref.shape[1]):
                for which, entry in enumerate(entries):
                    place = buffer_ref.at[index, slot, head, which]
                    values = place[...].astype(jnp.float32)
                    for t in range(T):
                        values = jnp.where(here[t], entry[t, head : head + 1], values)
                    place[...] = values.astype(place.dtype)
                    if which != KEYS or statistics_ref is None:
                        continue
                    fresh = _STATISTICS[kind](values, row < end)
                    if rows == 1:
                        rows_ref[index, slot, head] = fresh.astype(place.dtype)
                    else:
                        base = lax.div(first, jnp.int32(rows))
                        place = rows_ref.at[index, lax.div(page, jnp.int32(rows)) - base, head]
                        old = place[...].astype(jnp.float32)
                        number = lax.broadcasted_iota(jnp.int32, old.shape, 0)
                        fresh = jnp.where(number == lax.rem(page, jnp.int32(rows)), fresh, old)
                        place[...] = fresh.astype(place.dtype)

        for_pages(index, change_page)

    def for_sequences(step):
        lax.fori_loop(0, together, lambda index, _: step(index), None)

    for_sequences(lambda index: copies(index, lambda copy: copy.start(), back=False))
    for_sequences(lambda index: copies(index, lambda copy: copy.wait(), back=False))
    for_sequences(change)
    for_sequences(lambda index: copies(index, lambda copy: copy.start(), back=True))
    for_sequences(lambda index: copies(index, lambda copy: copy.wait(), back=True))


def _min_max(keys, valid):
    low = jnp.min(jnp.where(valid, keys, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(valid, keys, -jnp.inf), axis=0, keepdims=True)
    return jnp.concatenate([low, high])


def _mean_key(keys, valid):
    total = jnp.sum(jnp.where(valid, keys, 0.0), axis=0, keepdims=True)
    count = jnp.sum(jnp.where(valid, 1.0, 0.0), axis=0, keepdims=True)
    return total / jnp.maximum(count, 1.0)


_STATISTICS = {"min_max": _min_max, "mean_key": _mean_key}
"""The page statistics of `pallas_kernels.statistics` once more, of keys[S, D] where valid[S, D]."""
