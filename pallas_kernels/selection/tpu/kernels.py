"""Page selection on TPUs, in one launch: scores on the matrix unit, then the set of the best, no sorting.

Statistics stream through VMEM in blocks of several KV heads and pages, up to the newest page of any
sequence. Scores must be linear in them, so one or two matrix products give a block's. They stay in VMEM, a
KV head to a sublane and pages along the lanes: one for the group, its mean or maximum, or one for each
query head, of which shares of attention are made. After the last block `choose` finds the best ones of all
KV heads at once.

Statistics in 8 bits are converted to the queries' dtype, which holds every value of theirs, and the product
is multiplied by their scales.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.operation import before_launch, check_supported, operation
from pallas_kernels.scores import GROUP_REDUCE, SCORES, check_linear
from pallas_kernels.selection.tpu.choice import CHUNK, choose, scratch_of
from pallas_kernels.selection.tpu.shares import shares
from pallas_kernels.statistics import Statistics
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip, tiled_bytes

_BLOCK_SECONDS = 1e-6
"""Of streaming a block: it hides the latency of the next one's copy, and what a step of the grid costs."""


@operation
def select_pages(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    score: str,
    group_reduce: str,
    sink_pages: int,
    block: int | None = None,
    interpret: Any = False,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """See `pallas_kernels.selection.api.select_pages`; pages ascend, `block` of a head are read at once."""
    check_linear("Mosaic TPU", score)
    scales, statistics = statistics.scales, statistics.values
    B, N, D = q.shape
    K, P, Z = statistics.shape[1:4]
    G, mass = N // K, group_reduce == "mass"
    check_support(statistics.dtype if scales is None else q.dtype, D, page_size)
    if scales is None:
        check_supported("Mosaic TPU", vectors=(Z, (1, 2)))
    else:
        check_supported("Mosaic TPU", vectors_in_8_bits=(Z, (1,)))
    target = chip()
    heads = heads_per_step(B, K, target.cores)
    block = block or pages_per_block(target.bandwidth, heads, statistics)
    tiles = pl.cdiv(pl.cdiv(P, block) * block // LANES, CHUNK) * CHUNK
    places = pl.cdiv(capacity, LANES) * LANES
    scratch = scratch_of(heads, tiles)
    if mass:
        scratch.append(pltpu.VMEM((tiles * G * SUBLANES, LANES), jnp.float32))
    check_memory(
        "select_pages",
        target,
        vmem=2 * heads * block * (_row_bytes(statistics) + (0 if scales is None else SUBLANES * 4))
        + sum(tiled_bytes(ref.shape, ref.dtype) for ref in scratch)
        + 2 * (tiled_bytes((SUBLANES, places), jnp.int32) + tiled_bytes((heads * G, D), q.dtype)),
        smem=8 * B + 4096,
    )
    before_launch()

    newest = positions // page_size
    counts = jnp.minimum(budgets, newest + 1)
    # One vector per page: pages become the rows, which is how XLA lays the array out.
    operand = statistics if Z == 2 else statistics.reshape(B, K, P, D)
    operands = [operand] if scales is None else [operand, jnp.swapaxes(scales, 2, 3)]

    def body(
        newest_ref,  # [B]
        counts_ref,  # [B]
        q_ref,  # [1, 1, heads * G, D]
        statistics_ref,  # [1, heads, block, 2, D], or of one vector [1, heads, block, D]
        *refs,
    ):
        refs = iter(refs)
        scales_ref = None if scales is None else next(refs)  # [1, heads, 1, block]
        ids_ref = next(refs)  # [1, 1, heads, places]
        choice_refs = [next(refs) for _ in range(4)]  # [tiles * 8, 128] three times; [heads, 128, tiles]
        logits_ref = next(refs) if mass else None  # [tiles * G * 8, 128]
        b, step = pl.program_id(0), pl.program_id(2)
        first = step * block

        @pl.when(first <= newest_ref[b])
        def _():
            queries = q_ref[0, 0].astype(jnp.float32)
            for head in range(heads):
                own = queries[head * G : (head + 1) * G]
                scores = _scores(own, _vectors(statistics_ref, head, interpret), score, q.dtype)
                if scales is not None:
                    scores *= scales_ref[0, head]
                if not mass:
                    scores = GROUP_REDUCE[group_reduce](scores, axis=0, keepdims=True)
                for tile in range(block // LANES):
                    place = first // LANES + tile
                    part = scores[:, tile * LANES : (tile + 1) * LANES]
                    if mass:
                        rows = pl.ds(place * G * SUBLANES + head, G, stride=SUBLANES)
                        logits_ref[rows] = part * D**-0.5
                    else:
                        choice_refs[0][pl.ds(place * SUBLANES + head, 1)] = pltpu.bitcast(part, jnp.int32)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            newest = newest_ref[b]
            if mass:
                shares(choice_refs[0], logits_ref, newest, G)
            choose(ids_ref.at[0, 0], *choice_refs, newest, counts_ref[b], heads, sink_pages)

    def used(step, newest):
        return jnp.minimum(step, lax.div(jnp.maximum(newest, 0), jnp.int32(block)))

    def statistics_block(b, group, step, newest_ref, _):
        return (b, group, used(step, newest_ref[b]), *[0] * (operand.ndim - 3))

    def scales_block(b, group, step, newest_ref, _):
        return (b, group, 0, used(step, newest_ref[b]))

    launch = pl.pallas_call(
        body,
        name="select_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K // heads, jnp.max(newest, initial=0) // block + 1),
            in_specs=[
                pl.BlockSpec((1, 1, heads * G, D), lambda b, group, *_: (b, group, 0, 0)),
                pl.BlockSpec((1, heads, block, *operand.shape[3:]), statistics_block),
                pl.BlockSpec((1, heads, 1, block), scales_block),
            ][: 1 + len(operands)],
            out_specs=pl.BlockSpec((1, 1, heads, places), lambda b, group, *_: (b, group, 0, 0)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((B, K // heads, heads, capacity), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=target.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * N * P * Z * D,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in operands)
            + 4 * B * K * capacity,
            transcendentals=B * N * P if mass else 0,
        ),
        interpret=interpret,
    )
    ids = launch(newest, counts, q.reshape(B, K // heads, heads * G, D), *operands)
    return ids.reshape(B, K, capacity), jnp.broadcast_to(counts[:, None], (B, K))


def heads_per_step(batch, kv_heads, cores):
    """KV heads that are searched together: as many as a register has sublanes, but no core goes without."""
    fit = [heads for heads in range(1, SUBLANES + 1) if kv_heads % heads == 0]
    return max([heads for heads in fit if batch * kv_heads // heads % cores == 0], default=fit[-1])


def _row_bytes(statistics):
    """Of a page's statistics in VMEM, where a row has all lanes."""
    return statistics.shape[3] * max(statistics.shape[4], LANES) * statistics.dtype.itemsize


def pages_per_block(bandwidth, heads, statistics):
    """Pages of each head that arrive at once: enough to hide the latency of the next ones' copy."""
    wanted = pl.cdiv(int(_BLOCK_SECONDS * bandwidth), heads * _row_bytes(statistics))
    pages = statistics.shape[2]
    half = pl.cdiv(pages, 2)  # so that one block is scored while another arrives
    block = pl.cdiv(min(wanted, half), LANES) * LANES
    whole = [size for size in range(LANES, block + 1, LANES) if pages % size == 0 and 2 * size >= block]
    return max(whole, default=block)  # a last block that is cut short costs loops of its own


def _vectors(statistics_ref, head, interpret):
    """The statistics of a head's pages: Z arrays [block, D]."""
    _, heads, block, *vectors, D = statistics_ref.shape
    if not vectors:
        return [statistics_ref[0, head]]
    if interpret or (statistics_ref.dtype == jnp.float32 and D > LANES):  # which have no other view of memory
        return [statistics_ref[0, head, :, z] for z in range(2)]
    if statistics_ref.dtype == jnp.float32:
        rows = statistics_ref.reshape(heads * block * 2, D)
        return [rows[pl.ds(head * block * 2 + z, block, stride=2)] for z in range(2)]
    # The two vectors of a page share 32-bit words, the first in the lower halves. Rows are of 128 such words.
    parts = D // LANES if D > LANES else 1
    rows = statistics_ref.bitcast(jnp.uint32).reshape(heads * block * parts, D // parts)
    words = [rows[pl.ds(head * block * parts + part, block, stride=parts)] for part in range(parts)]
    words = jnp.concatenate(words, axis=1)
    halves = [words << 16, words & jnp.uint32(0xFFFF0000)]
    return [pltpu.bitcast(half, jnp.float32).astype(jnp.bfloat16) for half in halves]


def _scores(q, vectors, score, dtype):
    """Scores [G, block] of pages for a group's queries, float32; `dtype` is what the queries came in."""
    exact = dtype == jnp.bfloat16 and vectors[0].dtype != jnp.float32  # then products are, as of float32 not
    total = 0.0
    for weights, vector in zip(SCORES[score].coefficients(q), vectors, strict=True):
        total += lax.dot_general(
            weights.astype(jnp.bfloat16) if exact else weights,
            vector.astype(jnp.bfloat16 if exact else jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    return total
