"""Page update on TPUs, in place: the touched pages come to VMEM, and go back with their statistics.

A page of all KV heads comes in one copy. The copies of all sequences of a grid step are in flight together,
since at a few tokens it is latency that counts.

A copy cannot begin or end within the rows or lanes that lie together in memory. Two vectors of a page are a
piece of their own. Of statistics with one vector, and of the scales of 8-bit ones, neighbours come along
and go back as they came: 8 pages of vectors (a quarter of a tile (32, 128) in 8 bits), and 128 of scales,
which lie along the lanes. So do those of pages in 8 bits, one for each token. The last piece may end beyond
the last page, where memory has whole tiles too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import before_launch, check_supported, operation
from pallas_kernels.pages import Pages, QuantizedPages, in_codes, largest_code
from pallas_kernels.statistics import INT8_MAX, STATISTICS, PageStatistic, Statistics, in_units
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip, tiled_bytes

_ROWS = 16
"""Rows of a page that are changed together: those of a register in bfloat16; in 8 bits twice as many are."""


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
    scaled = isinstance(pages, QuantizedPages)
    check_support(k.dtype if scaled else pages.dtype, D, S, in_8_bits=scaled)
    if statistics is not None and statistics.scales is not None:
        check_supported("Mosaic TPU", vectors_in_8_bits=(statistics.values.shape[3], (1,)))
    statistic = None if statistics is None else STATISTICS[statistics.kind]
    kept, pieces = _kept(pages, statistics)
    touched = (T + S - 2) // S + 1
    target = chip()
    if not scaled:
        k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    lanes = max(D, LANES)
    page_bytes = 2 * K * S * lanes * pages.dtype.itemsize
    token_bytes = 4 * T * _padded(K, _ROWS) * lanes * k.dtype.itemsize
    fresh = [piece.buffer(array.shape, touched) for piece, array in zip(pieces, kept, strict=True)]
    kept_bytes = sum(tiled_bytes(shape, array.dtype) for shape, array in zip(fresh, kept, strict=True))
    sequence_bytes = touched * page_bytes + kept_bytes + token_bytes
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
    scratch = [
        pltpu.VMEM((together, touched, K, 2, S, D), pages.dtype),
        *(pltpu.VMEM((together, *shape), array.dtype) for shape, array in zip(fresh, kept, strict=True)),
    ]
    if interpret:  # its memory has no tiles
        kept = [piece.whole(array) for piece, array in zip(pieces, kept, strict=True)]
    state = [pages.codes if scaled else pages, *kept]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens = pl.BlockSpec((together, T, K, D), lambda step, *_: (step, 0, 0, 0))
    launch = pl.pallas_call(
        functools.partial(_body, together=together, pieces=pieces, scaled=scaled, statistic=statistic),
        name="update_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B // together,),
            in_specs=[tokens, tokens] + [hbm] * len(state),
            out_specs=[hbm] * len(state),
            scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA],
        ),
        # XLA may take all of an array to VMEM and back, unless it is told that HBM is meant. It cannot be
        # told so of what may be a program's own result: pages, and statistics that are not reshaped.
        out_shape=[
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
            *(
                (pltpu.HBM if piece.pages else jax.ShapeDtypeStruct)(array.shape, array.dtype)
                for piece, array in zip(pieces, kept, strict=True)
            ),
        ],
        input_output_aliases={4 + index: index for index in range(len(state))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=target.vmem),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=B * (2 * touched * page_bytes + 2 * kept_bytes + token_bytes // 2),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    codes, *kept = launch(spans, positions, k, v, *state)
    if interpret:
        kept = [
            lax.slice_in_dim(array, 0, P, axis=piece.axis) for array, piece in zip(kept, pieces, strict=True)
        ]
    if scaled:
        scales, *kept = kept
        pages = QuantizedPages(codes, jnp.moveaxis(scales, -1, 2))
    else:
        pages = codes
    if statistics is None:
        return pages, None
    values, *scales = kept
    scales = jnp.swapaxes(*scales, 2, 3) if scales else None
    return pages, statistics.replace(values=values.reshape(statistics.values.shape), scales=scales)


class _Piece(NamedTuple):
    """What is copied at once of an array of statistics, or of scales: some pages of all KV heads.

    Attributes:
      axis: of the array, its pages.
      pages: how many; 0 is a page by itself, whose neighbours are not copied.
    """

    axis: int
    pages: int

    def buffer(self, shape: tuple[int, ...], touched: int) -> tuple[int, ...]:
        """Shape of all pieces of an array of this shape that `touched` pages lie in."""
        kept = [self.pages] if self.pages else []
        count = (touched + self.pages - 2) // self.pages + 1 if self.pages else touched
        return (count, shape[1], *shape[2 : self.axis], *kept, *shape[self.axis + 1 :])

    def of(self, array: Any, sequence: Array, number: Array) -> Any:
        """The piece of this number."""
        if self.pages == array.shape[self.axis]:
            number = slice(None)
        elif self.pages:
            number = pl.ds(pl.multiple_of(number * self.pages, self.pages), self.pages)
        return array.at[(sequence, *[slice(None)] * (self.axis - 1), number)]

    def whole(self, array: Array) -> Array:
        """The array padded to whole pieces."""
        pad = -array.shape[self.axis] % max(self.pages, 1)
        return jnp.pad(array, [(0, pad if axis == self.axis else 0) for axis in range(array.ndim)])


def _kept(pages: Pages, statistics: Statistics | None) -> tuple[list[Array], list[_Piece]]:
    """Arrays beside the pages in the order of axes in which XLA has them in memory, and their pieces.

    Scales of pages in 8 bits [B, K, 2, S, P] have pages along the lanes, and so do those of statistics
    [B, K, 1, P]. Of one vector per page, pages are the rows.
    """
    kept, pieces = [], []
    if isinstance(pages, QuantizedPages):
        scales = jnp.moveaxis(pages.scales, 2, -1)
        kept, pieces = [scales], [_Piece(4, min(LANES, scales.shape[-1]))]
    if statistics is None:
        return kept, pieces
    B, K, P, Z, D = statistics.values.shape
    if Z == 2:
        return [*kept, statistics.values], [*pieces, _Piece(2, 0)]
    kept.append(statistics.values.reshape(B, K, P, D))
    pieces.append(_Piece(2, min(SUBLANES, P)))
    if statistics.scales is not None:
        kept.append(jnp.swapaxes(statistics.scales, 2, 3))
        pieces.append(_Piece(3, min(LANES, P)))
    return kept, pieces


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
    pieces: list[_Piece],
    scaled: bool,
    statistic: PageStatistic | None,
):
    """The kernel's body; pages and statistics come in and go out under two names of one array."""
    refs = refs[1 + len(pieces) :]
    pages_ref, *kept_refs = refs[: 1 + len(pieces)]  # [B, K, P, 2, S, D]; those of `_kept`
    buffer_ref, *fresh_refs, arrived = refs[1 + len(pieces) :]  # [together, touched, K, 2, S, D]; pieces
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

        def copy_sequence(index):
            def copy_page(page, slot):
                copy(pages_ref.at[sequence(index), :, page], buffer_ref.at[index, slot])

            for_pages(index, copy_page)
            for kept_ref, fresh_ref, piece in zip(kept_refs, fresh_refs, pieces, strict=True):

                def copy_piece(number, slot, there=kept_ref, here=fresh_ref, piece=piece):
                    copy(piece.of(there, sequence(index), number), here.at[index, slot])

                if back or piece.pages:  # those of other pages in the piece stay
                    for_pages(index, copy_piece, piece.pages or 1)

        for_sequences(copy_sequence)

    def written(entries):
        """Keys or values [K, D] as they are written, in a type that `where` has, and their scales [K, 1]."""
        entries = entries.astype(jnp.float32)
        if not scaled:
            return entries, None
        scales = jnp.max(jnp.abs(entries), axis=1, keepdims=True) / largest_code(pages_ref.dtype)
        return in_codes(entries, scales, pages_ref.dtype).astype(jnp.float32), scales

    def column(page, shape):
        """Where the scales of a page are in a piece."""
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        return lane == lax.rem(page, jnp.int32(pieces[0].pages))

    def scales_of(index, page, head, which):
        """A Ref[S, lanes] of the piece that has the scales of a page."""
        pages = jnp.int32(pieces[0].pages)
        number = lax.div(page, pages) - lax.div(spans_ref[0, sequence(index)], pages)
        return fresh_refs[0].at[index, number, head, which]

    def write_tokens(index):
        first = spans_ref[0, sequence(index)]
        at_once = min(page_size, 2 * _ROWS) if scaled else _ROWS
        row = lax.broadcasted_iota(jnp.int32, (at_once, k_ref.shape[-1]), 0)

        def write(t, _):
            position = positions_ref[sequence(index), t]

            @pl.when(position >= 0)
            def _():
                page = lax.div(position, jnp.int32(page_size))
                offset = lax.rem(position, jnp.int32(page_size))
                start = pl.multiple_of(lax.div(offset, jnp.int32(at_once)) * at_once, at_once)
                rows, here = pl.ds(start, at_once), row == offset - start
                for which, entries_ref in ((KEYS, k_ref), (VALUES, v_ref)):
                    entries, scales = written(entries_ref[index, t])
                    for head in range(heads):
                        place = buffer_ref.at[index, page - first, head, which, rows]
                        values = jnp.where(here, entries[head : head + 1], place[...].astype(jnp.float32))
                        place[...] = values.astype(place.dtype)
                        if scaled:
                            place = scales_of(index, page, head, which).at[rows]
                            token = lax.broadcasted_iota(jnp.int32, place.shape, 0) == offset - start
                            own = token & column(page, place.shape)
                            place[...] = jnp.where(own, scales[head : head + 1], place[...])

        lax.fori_loop(0, k_ref.shape[1], write, None)

    def compute_statistics(index):
        first, end = spans_ref[0, sequence(index)], spans_ref[2, sequence(index)]
        row = lax.broadcasted_iota(jnp.int32, pages_ref.shape[4:], 0)

        def store(which, page, head, fresh):
            """Puts what is new of a page in its place, and leaves the others of the piece as they are."""
            which += scaled
            axis, pages = pieces[which]
            number = lax.div(page, jnp.int32(pages or 1)) - lax.div(first, jnp.int32(pages or 1))
            place = fresh_refs[which].at[index, number, head]
            if pages:
                own = lax.broadcasted_iota(jnp.int32, place.shape, axis - 2) == lax.rem(
                    page, jnp.int32(pages)
                )
                fresh = jnp.where(own, fresh, place[...].astype(fresh.dtype))
            place[...] = fresh.astype(place.dtype)

        def compute(page, slot):
            valid = row + page * page_size < end
            for head in range(heads):
                keys = buffer_ref[index, slot, head, KEYS].astype(jnp.float32)
                if scaled:
                    scales = scales_of(index, page, head, KEYS)[...]
                    own = jnp.where(column(page, scales.shape), scales, 0.0)
                    keys *= jnp.sum(own, axis=1, keepdims=True)
                fresh = jnp.concatenate([part.of_page(keys, valid) for part in statistic.parts])
                if statistic.quantized:
                    scale = jnp.max(jnp.abs(fresh), axis=1, keepdims=True) / INT8_MAX
                    store(1, page, head, scale)
                    fresh = in_units(fresh, scale).astype(jnp.int32)
                store(0, page, head, fresh)

        for_pages(index, compute)

    copies(lambda copy: copy.start(), back=False)
    copies(lambda copy: copy.wait(), back=False)
    for_sequences(write_tokens)
    if statistic is not None:
        for_sequences(compute_statistics)
    copies(lambda copy: copy.start(), back=True)
    copies(lambda copy: copy.wait(), back=True)
