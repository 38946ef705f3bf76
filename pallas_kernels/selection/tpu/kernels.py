"""Page selection on TPUs, in one launch: scores on the matrix unit, then the set of the best, no sorting.

Statistics stream through VMEM in blocks of several KV heads and pages, up to the newest page of any sequence.
Every score of `SCORES` is linear in them, so two matrix products give a block's. They stay in VMEM, a head to
a sublane and pages along the lanes; after the last block `choose` finds the best ones of all heads at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.operation import before_launch, check_supported, operation
from pallas_kernels.scores import GROUP_REDUCE, SCORES, check_full_precision, check_linear
from pallas_kernels.selection.tpu.choice import CHUNK, choose, scratch_of
from pallas_kernels.statistics import Statistics
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip

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
    check_full_precision("Mosaic TPU", statistics, group_reduce)
    check_linear("Mosaic TPU", score)
    statistics = statistics.values
    B, N, D = q.shape
    K, P, Z = statistics.shape[1:4]
    check_support(statistics.dtype, D, page_size)
    check_supported("Mosaic TPU", vectors=(Z, (1, 2)))
    target = chip()
    heads = heads_per_step(B, K, target.cores)
    block = block or pages_per_block(target.bandwidth, heads, statistics)
    tiles = pl.cdiv(pl.cdiv(P, block) * block // LANES, CHUNK) * CHUNK
    places = pl.cdiv(capacity, LANES) * LANES
    scratch = scratch_of(heads, tiles)
    check_memory(
        "select_pages",
        target,
        vmem=2 * heads * block * _row_bytes(statistics)
        + sum(_bytes(ref.shape, ref.dtype) for ref in scratch)
        + 2 * (_bytes((SUBLANES, places), jnp.int32) + _bytes((heads * N // K, D), q.dtype)),
        smem=8 * B + 4096,
    )
    before_launch()

    newest = positions // page_size
    counts = jnp.minimum(budgets, newest + 1)
    # One vector per page: pages become the rows, which is how XLA lays the array out.
    operand = statistics if Z == 2 else statistics.reshape(B, K, P, D)

    def body(
        newest_ref,  # [B]
        counts_ref,  # [B]
        q_ref,  # [1, 1, heads * G, D]
        statistics_ref,  # [1, heads, block, 2, D], or of one vector [1, heads, block, D]
        ids_ref,  # [1, 1, heads, places]
        keys_ref,  # [tiles * 8, 128], as chosen and upto
        chosen_ref,
        upto_ref,
        ranks_ref,  # [heads, 128, tiles]
    ):
        b, step = pl.program_id(0), pl.program_id(2)
        first = step * block

        @pl.when(first <= newest_ref[b])
        def _():
            queries = q_ref[0, 0].astype(jnp.float32)
            for head in range(heads):
                own = queries[head * (N // K) : (head + 1) * (N // K)]
                scores = _scores(own, _vectors(statistics_ref, head, interpret), score, q.dtype)
                row = GROUP_REDUCE[group_reduce](scores, axis=0, keepdims=True)
                for tile in range(block // LANES):
                    place = (first // LANES + tile) * SUBLANES + head
                    part = row[:, tile * LANES : (tile + 1) * LANES]
                    keys_ref[pl.ds(place, 1)] = pltpu.bitcast(part, jnp.int32)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            scratch_refs = keys_ref, chosen_ref, upto_ref, ranks_ref
            choose(ids_ref.at[0, 0], *scratch_refs, newest_ref[b], counts_ref[b], heads, sink_pages)

    def statistics_block(b, group, step, newest_ref, _):
        step = jnp.minimum(step, lax.div(jnp.maximum(newest_ref[b], 0), jnp.int32(block)))
        return (b, group, step, *[0] * (operand.ndim - 3))

    launch = pl.pallas_call(
        body,
        name="select_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K // heads, jnp.max(newest, initial=0) // block + 1),
            in_specs=[
                pl.BlockSpec((1, 1, heads * N // K, D), lambda b, group, *_: (b, group, 0, 0)),
                pl.BlockSpec((1, heads, block, *operand.shape[3:]), statistics_block),
            ],
            out_specs=pl.BlockSpec((1, 1, heads, places), lambda b, group, *_: (b, group, 0, 0)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((B, K // heads, heads, capacity), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=target.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * N * P * Z * D,
            bytes_accessed=statistics.size * statistics.dtype.itemsize + 4 * B * K * capacity,
            transcendentals=0,
        ),
        interpret=interpret,
    )
    ids = launch(newest, counts, q.reshape(B, K // heads, heads * N // K, D), operand)
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


def _bytes(shape, dtype):
    rows, columns = shape[-2:]
    size = jnp.dtype(dtype).itemsize
    sublanes = SUBLANES * 4 // size
    padded = pl.cdiv(rows, sublanes) * sublanes * pl.cdiv(columns, LANES) * LANES
    return padded * size * (shape[0] if len(shape) == 3 else 1)


def _vectors(statistics_ref, head, interpret):
    """The statistics of a head's pages: Z arrays [block, D]."""
    _, heads, block, *vectors, D = statistics_ref.shape
    if not vectors:
        return [statistics_ref[0, head]]
    if interpret:  # knows no other view of memory
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
    exact = dtype == vectors[0].dtype == jnp.bfloat16  # such products are exact, as float32 ones are not
    total = 0.0
    for weights, vector in zip(SCORES[score].coefficients(q), vectors, strict=True):
        total += lax.dot_general(
            weights.astype(jnp.bfloat16) if exact else weights,
            vector if exact else vector.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    return total
