"""Page update on TPUs, in place: the touched pages come to VMEM, and go back with their statistics.

A page of all KV heads comes in one copy. The copies of all sequences of a grid step are in flight together,
since at a few tokens it is latency that counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import before_launch, operation
from pallas_kernels.pages import Pages
from pallas_kernels.statistics import STATISTICS, PageStatistic, Statistics
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip

_ROWS = 16
"""Rows of a page that are changed together: those of a register in bfloat16."""


@operation
def update_pages(
    pages: Pages,
    statistics: Statistics | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    interpret: Any = False,
) -> tuple[Pages, Statistics | None]:
    """See `pallas_kernels.update.api.update_pages`."""
    B, T, K, D = k.shape
    P, _, S = pages.shape[2:5]
    check_support(pages.dtype, D, S)
    statistic = None if statistics is None else STATISTICS[statistics.kind]
    # One vector per page: pages become the rows, which is how XLA lays the array out. Copies are of 8 rows.
    rows = 1 if statistic is None or statistic.vectors == 2 else SUBLANES
    if P % rows:
        raise NotImplementedError(
            f"update_pages: {P} pages are not a multiple of {rows}, as the Mosaic TPU kernel needs "
            f"for {statistic.name!r} statistics"
        )
    touched = (T + S - 2) // S + 1
    slices = (touched + rows - 2) // rows + 1

    target = chip()
    lanes = max(D, LANES) * pages.dtype.itemsize
    page_bytes, slice_bytes = 2 * K * S * lanes, K * max(rows, 2) * lanes
    token_bytes = 4 * T * _padded(K, _ROWS) * lanes
    sequence_bytes = touched * page_bytes + slices * slice_bytes + token_bytes
    together = _sequences_per_step(B, sequence_bytes, target)
    smem = 4 * (SUBLANES * _padded(B, LANES) + _padded(B, SUBLANES) * _padded(T, LANES))
    check_memory("update_pages", target, vmem=together * sequence_bytes, smem=smem)
    before_launch()

    positions = start[:, None] + jnp.arange(T)
    end = jnp.max(jnp.where(write, positions + 1, 0), axis=1)
    first = jnp.maximum(start // S, 0)
    last = jnp.where(end > 0, jnp.minimum(-(-end // S), P), 0)
    spans = jnp.stack([first, last, end])
    positions = jnp.where(write & (positions >= 0) & (positions < P * S), positions, -1)
    scratch = [pltpu.VMEM((together, touched, K, 2, S, D), pages.dtype)]
    state = [pages]
    if statistic is not None:
        shape = (K, 2, D) if rows == 1 else (K, rows, D)
        scratch.append(pltpu.VMEM((together, slices, *shape), pages.dtype))
        state.append(statistics.values if rows == 1 else statistics.values.reshape(B, K, P, D))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens = pl.BlockSpec((together, T, K, D), lambda step, *_: (step, 0, 0, 0))
    launch = pl.pallas_call(
        functools.partial(_body, together=together, rows=rows, statistic=statistic),
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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=target.vmem),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=B * (2 * touched * page_bytes + 2 * slices * slice_bytes + token_bytes // 2),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    pages, *rest = launch(spans, positions, k, v, *state)
    if statistics is None:
        return pages, None
    return pages, statistics.replace(values=rest[0].reshape(statistics.values.shape))


def _padded(size, tile):
    return -(-size // tile) * tile


def _sequences_per_step(batch, sequence_bytes, target):
    """How many sequences fit VMEM at once, but no core goes without."""
    counts = [count for count in range(1, batch + 1) if batch % count == 0]
    fit = [count for count in counts if count * sequence_bytes <= target.vmem]
    return max([count for count in fit if batch // count % target.cores == 0], default=max(fit, default=1))


def _body(
    spans_ref,  # [3, B]: first and last touched page, end of the tokens
    positions_ref,  # [B, T]
    k_ref,  # [together, T, K, D], as v
    v_ref,
    *refs,
    together: int,
    rows: int,
    statistic: PageStatistic | None,
):
    """The kernel's body; pages and statistics come in and go out under two names of one array."""
    if statistic is None:
        (
            _,
            pages_ref,  # [B, K, P, 2, S, D]
            buffer_ref,  # [together, touched, K, 2, S, D]
            arrived,
        ) = refs
    else:
        (
            *_,
            pages_ref,
            statistics_ref,  # [B, K, P, 2, D], or [B, K, P, D]
            buffer_ref,
            fresh_ref,  # [together, slices, K, 2 or rows, D]
            arrived,
        ) = refs
    heads, page_size = pages_ref.shape[1], pages_ref.shape[4]

    def sequence(index):
        return pl.program_id(0) * together + index

    def for_sequences(step):
        lax.fori_loop(0, together, lambda index, _: step(index), None)

    def for_pages(index, step, rows=1):
        """Calls `step(number, slot)` for a sequence's touched slices of `rows` pages; slots count from 0."""
        first, last = (spans_ref[bound, sequence(index)] for bound in range(2))
        lowest = lax.div(first, jnp.int32(rows))
        end = jnp.where(last > first, lax.div(last + (rows - 1), jnp.int32(rows)), lowest)
        lax.fori_loop(lowest, end, lambda number, _: step(number, number - lowest), None)

    def copies(act, *, back):
        """Starts or waits for all copies to VMEM, or back."""

        def copy(there, here):
            act(pltpu.make_async_copy(*((here, there) if back else (there, here)), arrived))

        def copy_statistics(index, there, here):
            def copy_slice(number, slot):
                place = number if rows == 1 else pl.ds(pl.multiple_of(number * rows, rows), rows)
                copy(there.at[sequence(index), :, place], here.at[index, slot])

            for_pages(index, copy_slice, rows)

        def copy_sequence(index):
            def copy_page(page, slot):
                copy(pages_ref.at[sequence(index), :, page], buffer_ref.at[index, slot])

            for_pages(index, copy_page)
            if statistic is not None and (back or rows > 1):  # those of other pages in the slice stay
                copy_statistics(index, statistics_ref, fresh_ref)

        for_sequences(copy_sequence)

    def write_tokens(index):
        first = spans_ref[0, sequence(index)]
        row = lax.broadcasted_iota(jnp.int32, (_ROWS, k_ref.shape[-1]), 0)

        def write(t, _):
            position = positions_ref[sequence(index), t]

            @pl.when(position >= 0)
            def _():
                slot = lax.div(position, jnp.int32(page_size)) - first
                offset = lax.rem(position, jnp.int32(page_size))
                start = pl.multiple_of(lax.div(offset, jnp.int32(_ROWS)) * _ROWS, _ROWS)
                here = row == offset - start
                for which, entries_ref in ((KEYS, k_ref), (VALUES, v_ref)):
                    entries = entries_ref[index, t].astype(jnp.float32)
                    for head in range(heads):
                        place = buffer_ref.at[index, slot, head, which, pl.ds(start, _ROWS)]
                        values = jnp.where(here, entries[head : head + 1], place[...].astype(jnp.float32))
                        place[...] = values.astype(place.dtype)

        lax.fori_loop(0, k_ref.shape[1], write, None)

    def compute_statistics(index):
        first, end = spans_ref[0, sequence(index)], spans_ref[2, sequence(index)]
        row = lax.broadcasted_iota(jnp.int32, pages_ref.shape[4:], 0)

        def compute(page, slot):
            valid = row + page * page_size < end
            number = lax.div(page, jnp.int32(rows)) - lax.div(first, jnp.int32(rows))
            for head in range(heads):
                keys = buffer_ref[index, slot, head, KEYS].astype(jnp.float32)
                fresh = jnp.concatenate([part.of_page(keys, valid) for part in statistic.parts])
                place = fresh_ref.at[index, number, head]
                if rows > 1:  # only this page's row of the slice
                    own = lax.broadcasted_iota(jnp.int32, place.shape, 0) == lax.rem(page, jnp.int32(rows))
                    fresh = jnp.where(own, fresh, place[...].astype(jnp.float32))
                place[...] = fresh.astype(place.dtype)

        for_pages(index, compute)

    copies(lambda copy: copy.start(), back=False)
    copies(lambda copy: copy.wait(), back=False)
    for_sequences(write_tokens)
    if statistic is not None:
        for_sequences(compute_statistics)
    copies(lambda copy: copy.start(), back=True)
    copies(lambda copy: copy.wait(), back=True)
