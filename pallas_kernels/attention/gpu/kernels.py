"""Attention over pages on Hopper GPUs: flash decoding whose key blocks are gathered page by page.

Two launches. `_attend` runs a block of threads per sequence, KV head and split of the pages, see
`thread_block.py`. `merge_splits` joins the splits of a query with each other and with its cached output, by
log-sum-exp, see `merging.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.gpu.blocks import Blocks, choose_blocks
from pallas_kernels.attention.gpu.merging import merge_splits
from pallas_kernels.attention.gpu.thread_block import Ring, attend_to_split
from pallas_kernels.attention.reference import merge_sinks
from pallas_kernels.gpu import TILE_ROWS, check_support, kernel, matrix
from pallas_kernels.operation import operation
from pallas_kernels.pages import Pages, QuantizedPages


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
    loaded = jax.new_ref(last_loaded)
    o, lse, *_ = _attend_to_selected(q, pages, positions, (page_ids, counts, loaded), blocks, interpret)
    cached = (cached_o, cached_lse) if q.shape[1] > 1 else None
    o, lse = merge_splits(o, lse, cached, None, q.shape, jnp.float32, interpret)
    return o, lse, loaded[...]


@operation
def attend_window(
    q: Float[Array, "B W N D"],
    pages: Pages,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    last_loaded: Int[Array, "B K P"],
    positions: Int[Array, "B W"],
    cached_o: Float[Array, "B older N D"],
    cached_lse: Float[Array, "B older N"],
    active: Bool[Array, " B"],
    *,
    dtype: Any,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[
    Float[Array, "B W N D"],
    Float[Array, "B W N"],
    Int[Array, "B K P"],
    Float[Array, "B older N D"],
    Float[Array, "B older N"],
    Int[Array, "B K C"] | None,
]:
    """See `pallas_kernels.attention.api.attend_window`."""
    loaded = jax.new_ref(last_loaded)
    o, lse, *first = _attend_to_selected(q, pages, positions, (page_ids, counts, loaded), blocks, interpret)
    if q.shape[1] == 1:  # the output cache is empty
        o, lse = merge_splits(o, lse, None, None, q.shape, dtype, interpret)
        return o, lse, loaded[...], cached_o, cached_lse, None
    cached = jax.new_ref(cached_o), jax.new_ref(cached_lse)
    o, lse = merge_splits(o, lse, cached, active, q.shape, dtype, interpret)
    return o, lse, loaded[...], cached[0][...], cached[1][...], *first


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
    blocks = blocks or choose_blocks(q, pages, pages.shape[2])
    o, lse = _attend(q, pages, positions, None, blocks, interpret)
    o, lse = merge_splits(o, lse, None, None, q.shape, dtype if sinks is None else jnp.float32, interpret)
    return merge_sinks(o, lse, sinks).astype(dtype)


@operation
def window_attention(
    q: Float[Array, "B W N D"],
    pages: Pages,
    positions: Int[Array, "B W"],
    sinks: Float[Array, " N"] | None = None,
    *,
    window: int,
    ring: int,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Float[Array, "B W N D"]:
    """See `pallas_kernels.sliding.api.window_attention`."""
    check(q, pages)
    blocks = blocks or choose_blocks(q, pages, pages.shape[2])
    o, lse = _attend(q, pages, positions, None, blocks, interpret, Ring(window, ring))
    o, lse = merge_splits(o, lse, None, None, q.shape, jnp.float32, interpret)
    return merge_sinks(o, lse, sinks)


def check(q: Array, pages: Pages) -> None:
    """Raises `NotImplementedError` for what the kernels do not support."""
    eight = isinstance(pages, QuantizedPages)
    check_support(q.dtype if eight else pages.dtype, pages.shape[-1], pages.shape[-2])
    if eight and pages.shape[-1] > 128:
        raise NotImplementedError(
            f"attention: head_dim {pages.shape[-1]} over pages in 8 bits does not fit the shared memory of "
            "the Mosaic GPU kernel, which takes 64 or 128"
        )
    if eight and q.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"attention: q is {q.dtype}; over pages in 8 bits the Mosaic GPU kernel takes bfloat16"
        )
    if not eight and q.dtype != pages.dtype:
        raise NotImplementedError(
            f"attention: q is {q.dtype} and pages are {pages.dtype}; the Mosaic GPU kernel takes one dtype"
        )
    slots, group = q.shape[1], q.shape[2] // pages.shape[1]
    if slots * group > TILE_ROWS:
        raise NotImplementedError(
            f"attention: {slots} slots x {group} heads of a group are more than the {TILE_ROWS} rows of the "
            "Mosaic GPU kernel"
        )


def _attend_to_selected(q, pages, positions, selection, blocks, interpret):
    """`_attend` to a selection that the kernels support, cut as `blocks` says or, if None, as is best."""
    check(q, pages)
    return _attend(
        q, pages, positions, selection, blocks or choose_blocks(q, pages, selection[0].shape[-1]), interpret
    )


def _attend(q, pages, positions, selection, blocks, interpret, ring=None):
    """Attention over each split of the pages.

    Args:
      q: [B, W, N, D].
      pages: [B, K, P, 2, S, D], or codes and scales.
      positions: [B, W].
      selection: page_ids, counts and a Ref to last_loaded, or None for all pages.
      blocks: how to cut the work.
      interpret: see `pallas_kernels.gpu.kernel`.
      ring: what the pages are; None: they begin with position 0.

    Returns:
      o[B, K, splits, R8, D] and its base-2 log-sum-exp[B, K, splits, 64]; R8 is W * G rounded up to 8. With
      older slots and a selection, also the position from which on queries newly attend to each page[B, K, C].
    """
    B, W, N, D = q.shape
    K, P, _, S, _ = pages.shape[1:]
    tokens = blocks.pages * S
    dense, eight = selection is None, isinstance(pages, QuantizedPages)
    kept = [pages.codes, pages.scales] if eight else [pages]
    copies = len(kept) * (1 if dense and blocks.pages <= P else blocks.pages)  # of one stage
    converted = [matrix((tokens, D), q.dtype)] * (2 * blocks.warpgroups)
    of_pages = [] if dense or W == 1 else [jax.ShapeDtypeStruct(selection[0].shape, jnp.int32)]
    launch = kernel(
        functools.partial(
            attend_to_split,
            blocks=blocks,
            dense=dense,
            eight=eight,
            ring=ring,
            interpret=interpret is not None,
        ),
        name="window_attention" if ring else "dense_attention" if dense else "retro_attention",
        out_type=[
            jax.ShapeDtypeStruct((B, K, blocks.splits, -(-W * N // K // 8) * 8, D), jnp.float32),
            jax.ShapeDtypeStruct((B, K, blocks.splits, TILE_ROWS), jnp.float32),
            *of_pages,
        ],
        grid=(B, K, blocks.splits),
        grid_names=("sequence", "head", "split"),
        scratch=[
            plgpu.SMEM((TILE_ROWS, D), q.dtype),
            matrix((TILE_ROWS, D), q.dtype),
            (plgpu.SMEM if eight else matrix)((blocks.stages, 2 * tokens, D), pages.dtype),
            plgpu.SMEM((TILE_ROWS, D), jnp.float32),
            plgpu.SMEM((2, TILE_ROWS), jnp.float32),
            *([plgpu.SMEM((blocks.stages, 2 * tokens), jnp.float32), *converted] if eight else []),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages),
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(),
        ],
        warpgroups=blocks.warpgroups + 1,
        interpret=interpret,
    )
    # A page's keys and values are one copy of 2 * S rows, their scales one of 2 * S numbers.
    kept = [array.reshape(B, K, P * 2 * S, *array.shape[5:]) for array in kept]
    arguments = [q.reshape(B, W, K, N // K, D), kept[0], positions, *kept[1:], *(selection or ())]
    return launch(*arguments)
