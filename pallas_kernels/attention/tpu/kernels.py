"""Attention over pages on TPUs: flash decoding over a stream of pages that are copied one by one.

A grid step is one sequence and KV head, an item; `page_stream.py` brings its pages to VMEM in blocks, ahead
of use, and begins with those of the next item before this one ends. The window's slots and the heads of a
group are the rows of one matrix product, so that a page is loaded once for all of them. On chips whose two
TensorCores are one device, each takes half of the items.

Pages in 8 bits come by the same copies, of half the bytes. Codes are converted to the queries' dtype, which
holds each of theirs; scores are multiplied by the scales of keys, and weights by those of values, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference
from pallas_kernels.attention.reference import fold_rows, merge_sinks, unfold_rows
from pallas_kernels.attention.tpu.blocks import Blocks, choose_blocks, smem_bytes, vmem_bytes
from pallas_kernels.attention.tpu.page_stream import PageStream
from pallas_kernels.attention.tpu.scales import by_lanes, scale_bytes
from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import before_launch, operation
from pallas_kernels.pages import Pages, QuantizedPages
from pallas_kernels.tpu import LANES, SUBLANES, check_memory, check_support, chip

MAX_ROWS = 128
"""Slots times heads of a group."""
SPARE_VMEM = 4 << 20
"""Bytes beside the kernel's own buffers, for what the compiler keeps in VMEM: scores, weights, spills."""
LOG2E = 1.4426950408889634
LOWEST = -1e30
"""Of a running maximum: finite, so that its difference to -inf is not NaN."""


@operation
def retro_attention(
    q: Float[Array, "B W N D"],
    pages: Pages,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    last_loaded: Int[Array, "B K P"],
    positions: Int[Array, "B W"],
    cached_o: Float[Array, "B older N D"],
    cached_lse: Float[Array, "B older N"],
    *,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"], Int[Array, "B K P"]]:
    """See `pallas_kernels.attention.api.retro_attention`."""
    check(q, pages)
    cached = (cached_o, cached_lse) if q.shape[1] > 1 else None
    selection = _whole_lanes(page_ids), counts, _whole_lanes(last_loaded)
    o, lse, loaded = _attend(q, pages, positions, selection, cached, blocks, interpret)
    return o, lse, loaded[..., : last_loaded.shape[-1]]


attend_window = functools.partial(reference.attend_window, attention=retro_attention)
"""See `pallas_kernels.attention.api.attend_window`; XLA moves the output cache on."""


@operation
def dense_attention(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None = None,
    *,
    dtype: Any = jnp.float32,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Float[Array, "B T N D"]:
    """See `pallas_kernels.attention.api.dense_attention`."""
    check(q, pages)
    o, lse, _ = _attend(q, pages, positions, None, None, blocks, interpret)
    return merge_sinks(o, lse, sinks).astype(dtype)


def check(q: Array, pages: Pages) -> None:
    """Raises `NotImplementedError` for what the kernels do not support."""
    scaled = isinstance(pages, QuantizedPages)
    S, D = pages.shape[-2:]
    check_support(q.dtype if scaled else pages.dtype, D, S, in_8_bits=scaled)
    if not scaled and q.dtype != pages.dtype:
        raise NotImplementedError(
            f"attention: q is {q.dtype} and pages are {pages.dtype}; the Mosaic TPU kernel takes one dtype"
        )
    slots, group = q.shape[1], q.shape[2] // pages.shape[1]
    if slots * group > MAX_ROWS:
        raise NotImplementedError(
            f"attention: {slots} slots x {group} heads of a group are more than the {MAX_ROWS} rows of the "
            "Mosaic TPU kernel"
        )


def _whole_lanes(x):
    """Copies between HBM and scalar memory are of 128 entries or multiples of them."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % LANES)))


def _rows(x, K, rows):
    """[B, W, N, D] by KV head, folded and padded to `rows` rows: [B, K, rows, D]."""
    x = fold_rows(x, K)
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))


def _attend(q, pages, positions, selection, cached, blocks, interpret):
    """One launch: o[B, W, N, D], lse[B, W, N] and, with a selection, last_loaded.

    Args:
      q: [B, W, N, D].
      pages: [B, K, P, 2, S, D].
      positions: [B, W].
      selection: page_ids, counts and last_loaded, or None for all pages.
      cached: o and lse of the older slots, or None.
      blocks: how to cut the work, or None for the rule's choice.
      interpret: `InterpretParams` to run in the interpreter.
    """
    B, W, N, D = q.shape
    K, P, _, S, _ = pages.shape[1:]
    target = chip()
    capacity = P if selection is None else selection[0].shape[-1]
    rows = -(-W * N // K // SUBLANES) * SUBLANES
    blocks = blocks or choose_blocks(target, S, D, pages.dtype.itemsize, capacity)
    name = "dense_attention" if selection is None else "retro_attention"
    scaled = isinstance(pages, QuantizedPages)
    vmem = vmem_bytes(blocks, S, D, pages.dtype.itemsize, rows, cached is not None)
    if scaled:
        vmem += scale_bytes(P, S)
    smem = smem_bytes(blocks, B, W, K, P, None if selection is None else capacity)
    check_memory(name, target, vmem=vmem, smem=smem)
    before_launch()
    cores = target.cores if B * K % target.cores == 0 else 1
    steps = B * K // cores

    def row_spec(columns):
        def of_item(core, step, *_):
            item = core * steps + step
            return lax.div(item, K), lax.rem(item, K), 0, 0

        return pl.BlockSpec((1, 1, rows, columns), of_item)

    any_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    scalars, operands, specs = [positions], [_rows(q, K, rows)], [row_spec(D)]
    if cached is not None:
        lse = jnp.pad(cached[1][..., None], ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=-jnp.inf)
        older = jnp.pad(cached[0], ((0, 0), (0, 1), (0, 0), (0, 0)))
        operands += [_rows(older, K, rows), _rows(lse, K, rows)]
        specs += [row_spec(D), row_spec(1)]
    kept = [pages.codes, by_lanes(pages.scales, whole=interpret is not None)] if scaled else [pages]
    operands, specs = [*operands, *kept], [*specs, *[any_spec] * len(kept)]
    out_shapes = [
        jax.ShapeDtypeStruct((B, K, rows, D), jnp.float32),
        jax.ShapeDtypeStruct((B, K, rows, 1), jnp.float32),
    ]
    out_specs = [row_spec(D), row_spec(1)]
    aliases = {}
    if selection is not None:
        page_ids, counts, last_loaded = selection
        scalars.append(counts)
        operands, specs = [*operands, page_ids, last_loaded], [*specs, any_spec, any_spec]
        aliases[len(scalars) + len(operands) - 1] = len(out_shapes)
        out_shapes.append(jax.ShapeDtypeStruct(last_loaded.shape, jnp.int32))
        out_specs.append(any_spec)
    read = min(capacity, P) * B * K
    results = pl.pallas_call(
        functools.partial(
            _attend_to_item,
            cached=cached is not None,
            scaled=scaled,
            dense=selection is None,
            blocks=blocks,
            group=N // K,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=PageStream.scratch(blocks, pages, selection),
        ),
        out_shape=out_shapes,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=min(vmem + SPARE_VMEM, target.vmem),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * read * S * D * rows,
            transcendentals=read * S * rows,
            bytes_accessed=read * 2 * S * D * pages.dtype.itemsize + (B * K * P * 2 * S * 4 if scaled else 0),
        ),
        interpret=interpret if interpret is not None else False,
        name=name,
    )(*scalars, *operands)
    o, lse = (unfold_rows(x[:, :, : W * N // K], W) for x in results[:2])
    return o, lse[..., 0], results[2] if selection is not None else None


def _attend_to_item(*refs, cached, scaled, dense, blocks, group):
    """The kernel's body: all pages of one item, merged with the cached output."""
    # Scalars: positions[B, W] and counts[B, K].
    positions, *refs = refs
    counts, *refs = (None, *refs) if dense else refs
    # Of this item: q[1, 1, rows, D], and its cached output and log-sum-exp[1, 1, rows, 1].
    q_ref, *refs = refs
    cached_o, cached_lse, *refs = refs if cached else (None, None, *refs)
    # In HBM: pages[B, K, P, 2, S, D], of those in 8 bits scales[B, K, 2, S, P], page_ids[B, K, C] and
    # last_loaded[B, K, P], as it comes.
    pages, *refs = refs
    scales, *refs = refs if scaled else (None, *refs)
    page_ids, _, *refs = (None, None, *refs) if dense else refs
    # Outputs, shaped as the inputs: this item's, and in HBM last_loaded as it goes. Then scratch.
    o_ref, lse_ref, *refs = refs
    last_loaded, *scratch = (None, *refs) if dense else refs
    selection = None if dense else (page_ids, counts, last_loaded)
    stream = PageStream(pages, scales, positions, selection, scratch, blocks)

    rows, D = q_ref.shape[2:]
    limit = _positions_of_rows(positions, stream.item.b, rows, group)
    scale = D**-0.5 * LOG2E
    q = q_ref[0, 0]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def attend(index, carry):
        """One step of flash attention over a block of pages."""
        highest, norm, acc = carry
        block = stream.next_block(index)
        scores = lax.dot_general(
            q,
            stream.numbers(block, KEYS, q.dtype),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        # Between keys and values: the compiler moves no load of a block past a copy to another one.
        stream.issue_ahead(index)
        horizon, key_scales, value_scales = stream.along_tokens(index)
        if scaled:
            scores *= key_scales
        tiles = scores.reshape(rows // SUBLANES, SUBLANES, -1)
        scores = jnp.where(horizon < limit, tiles, -jnp.inf).reshape(scores.shape)
        before, highest = highest, jnp.maximum(highest, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2((scores - highest) * scale)
        decay = jnp.exp2((before - highest) * scale)
        norm = norm * decay + weights.sum(axis=1, keepdims=True)
        if scaled:
            weights *= value_scales
        v = stream.numbers(block, VALUES, q.dtype)
        weighted = lax.dot_general(
            weights.astype(v.dtype),
            v,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return highest, norm, acc * decay + weighted

    highest, norm, acc = lax.fori_loop(
        0,
        stream.begin(),
        attend,
        (
            jnp.full((rows, 1), LOWEST, jnp.float32),
            jnp.zeros((rows, 1), jnp.float32),
            jnp.zeros((rows, D), jnp.float32),
        ),
    )
    stream.end()
    seen = norm > 0
    o = acc * jnp.where(seen, 1 / norm, 0.0)
    lse = jnp.where(seen, highest * (D**-0.5) + jnp.log(norm), -jnp.inf)
    if cached:
        o, lse = _merge(o, lse, cached_o[0, 0], cached_lse[0, 0])
    o_ref[0, 0], lse_ref[0, 0] = o, lse


def _merge(o_a, lse_a, o_b, lse_b):
    """As `pallas_kernels.attention.merge`, with a column of log-sum-exp."""
    highest = jnp.maximum(jnp.maximum(lse_a, lse_b), LOWEST)
    share_a, share_b = jnp.exp(lse_a - highest), jnp.exp(lse_b - highest)
    norm = share_a + share_b
    seen = norm > 0
    o = (share_a * o_a + share_b * o_b) * jnp.where(seen, 1 / norm, 0.0)
    return o, jnp.where(seen, highest + jnp.log(norm), -jnp.inf)


def _positions_of_rows(positions, b, rows, group):
    """The position of each row's slot in every lane, -1 for rows beyond: [rows / 8, 8, 1]."""
    shape = rows // SUBLANES, SUBLANES, LANES
    row = lax.broadcasted_iota(jnp.int32, shape, 0) * SUBLANES + lax.broadcasted_iota(jnp.int32, shape, 1)
    limit = jnp.full(shape, -1, jnp.int32)
    for slot in range(positions.shape[1]):
        limit = jnp.where((row >= slot * group) & (row < (slot + 1) * group), positions[b, slot], limit)
    return limit[..., :1]
