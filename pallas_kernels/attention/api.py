"""Public functions of attention over pages.

Pages are floating-point numbers, or 8 bits with scales (`pallas_kernels.pages`); for anything else each
function raises TypeError or ValueError.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import mass, reference, residual
from pallas_kernels.attention.gpu import kernels as mosaic_gpu
from pallas_kernels.attention.tpu import kernels as mosaic_tpu
from pallas_kernels.dispatch import BY_HEAD, by_sequence, dispatch
from pallas_kernels.pages import Pages, check_pages
from pallas_kernels.statistics import Statistics


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
    implementation: str | None = None,
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"], Int[Array, "B K P"]]:
    """One load of the selected pages serves the newest query and revises those before it.

    The newest slot (the last) attends to all selected pages. An older slot at position p attends to those
    it has not used yet, last_loaded < p; its result is merged with its cached one. Every slot sees only
    keys at positions <= its own. With W = 1 this is Quest's sparse attention. RetroAttention, section 3.

    Args:
      q: queries of the window's slots, oldest first, rotary embedding applied.
      pages: keys and values of one layer; pages that are not selected may hold anything.
      page_ids: the selected pages in any order, without repetition among the first `counts`.
      counts: how many entries of `page_ids` are selected; the rest may hold anything. 0 loads nothing.
      last_loaded: the position whose step loaded the page last, -1 if none did.
      positions: each slot's position, -1 for a slot without a query.
      cached_o: the older slots' attention outputs so far, float32.
      cached_lse: and their log-sum-exp, -inf for none.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      o: attention outputs, float32; 0 where nothing is visible.
      lse: their log-sum-exp, -inf where nothing is visible.
      last_loaded: with the selected pages set to the newest slot's position.

    Raises:
      ValueError: heads or slots do not fit together.
    """
    _check_window(q, pages, cached_o)
    return dispatch(
        "retro_attention",
        implementation,
        {
            "xla": reference.retro_attention,
            "mosaic_gpu": mosaic_gpu.retro_attention,
            "mosaic_tpu": mosaic_tpu.retro_attention,
        },
        (by_sequence(2, 1, 1, 1, 1, None, 2, 2), by_sequence(2, 2, 1)),
        q,
        pages,
        page_ids,
        counts,
        last_loaded,
        positions,
        cached_o,
        cached_lse,
    )


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
    implementation: str | None = None,
) -> tuple[
    Float[Array, "B W N D"],
    Float[Array, "B W N"],
    Int[Array, "B K P"],
    Float[Array, "B older N D"],
    Float[Array, "B older N"],
    Int[Array, "B K C"] | None,
]:
    """`retro_attention` as a decode step takes it: it also moves the output cache on by one token.

    Args:
      q: as for `retro_attention`, like the arguments that follow.
      pages: keys and values of one layer.
      page_ids: the selected pages.
      counts: how many entries of `page_ids` are selected.
      last_loaded: the position whose step loaded the page last.
      positions: each slot's position.
      cached_o: the older slots' attention outputs so far, float32.
      cached_lse: and their log-sum-exp.
      active: sequences that decode a token; the others keep their output cache.
      dtype: of the outputs.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      o, in `dtype`, lse and last_loaded of `retro_attention`; then the output cache of the next step, in
      float32: outputs and log-sum-exp of all slots but the oldest; then of each selected page the position
      from which on queries attend to it and have not before (beyond `counts` anything; None without older
      slots, as the newest query attends to all).

    Raises:
      ValueError: heads or slots do not fit together.
    """
    _check_window(q, pages, cached_o)
    candidates = {
        "xla": reference.attend_window,
        "mosaic_gpu": mosaic_gpu.attend_window,
        "mosaic_tpu": mosaic_tpu.attend_window,
    }
    results, kept = by_sequence(2, 2, 1, 2, 2, 1), ()
    if q.shape[1] == 1:  # XLA crashes on results without elements that are spread over GPUs
        candidates = {name: functools.partial(_of_newest, attend) for name, attend in candidates.items()}
        results, kept = results[:3], (cached_o, cached_lse, None)
    found = dispatch(
        "attend_window",
        implementation,
        candidates,
        (by_sequence(2, 1, 1, 1, 1, None, 2, 2, None), results),
        q,
        pages,
        page_ids,
        counts,
        last_loaded,
        positions,
        cached_o,
        cached_lse,
        active,
        dtype=dtype,
    )
    return *found, *kept


def _of_newest(attend: Callable[..., tuple[Array, ...]], *arrays: Any, **options: Any) -> tuple[Array, ...]:
    """`attend_window` without what it returns of older slots."""
    return attend(*arrays, **options)[:3]


def _check_window(q: Float[Array, "B W N D"], pages: Pages, cached_o: Float[Array, "B older N D"]) -> None:
    check_pages(pages)
    slots, heads = q.shape[1:3]
    if heads % pages.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {pages.shape[1]} KV heads")
    if cached_o.shape[1] != slots - 1:
        raise ValueError(
            f"the output cache holds {cached_o.shape[1]} slots; a window of {slots} needs {slots - 1}"
        )


def dense_attention(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None = None,
    *,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """Causal attention over every page up to each query's position, computed in float32.

    Serves prefill (T tokens of a chunk), the dense prefix of layers and the full-attention baseline (T = 1).

    Args:
      q: queries, rotary embedding applied.
      pages: keys and values of one layer, those of the queries included; what lies beyond a query's
        position may hold anything.
      positions: each query's position; a query at -1 sees nothing and gives 0.
      sinks: a logit of each head that takes part in the softmax and has no value; None: there are none.
      dtype: of the result.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: query heads are not a multiple of KV heads.
    """
    check_pages(pages)
    if q.shape[2] % pages.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {pages.shape[1]} KV heads")
    return dispatch(
        "dense_attention",
        implementation,
        {
            "xla": reference.dense_attention,
            "mosaic_gpu": mosaic_gpu.dense_attention,
            "mosaic_tpu": mosaic_tpu.dense_attention,
        },
        ((*by_sequence(2, 1, None), BY_HEAD), *by_sequence(2)),
        q,
        pages,
        positions,
        sinks,
        dtype=dtype,
    )


def attend_pages(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    allowed: Bool[Array, "B K P"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """Dense attention, or causal attention over the `allowed` pages only.

    Runs block by block up to the last position in use, so that the cost follows the context and not the
    capacity of the cache.
    """
    check_pages(pages)
    return dispatch(
        "attend_pages",
        implementation,
        {"xla": reference.attend_pages},
        ((*by_sequence(2, 1, None, 1), BY_HEAD), *by_sequence(2)),
        q,
        pages,
        positions,
        allowed,
        sinks,
    )


def attention_mass(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    allowed: Bool[Array, "B K P"],
    sinks: Float[Array, " N"] | None = None,
    *,
    group_reduce: str,
    implementation: str | None = None,
) -> Float[Array, "B K P"]:
    """The attention that T queries give to each page, summed over the queries; reads every key.

    Runs block by block, twice: for the queries' log-sum-exp, then for their weights. Nothing of the size of
    T times the context is ever in memory.

    Args:
      q: queries, rotary embedding applied.
      pages: keys and values of one layer; what lies beyond a query's position may hold anything.
      positions: each query's position; a query at -1 gives nothing.
      allowed: pages that may be attended to; the others get 0.
      sinks: see `dense_attention`; what they take, no page gets.
      group_reduce: name in `GROUP_REDUCE`.
      implementation: see `pallas_kernels.dispatch`.
    """
    check_pages(pages)
    return dispatch(
        "attention_mass",
        implementation,
        {"xla": mass.attention_mass},
        ((*by_sequence(2, 1, None, 1), BY_HEAD), *by_sequence(1)),
        q,
        pages,
        positions,
        allowed,
        sinks,
        group_reduce=group_reduce,
    )


def selected_mass(
    q: Float[Array, "B N D"],
    pages: Pages,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    positions: Int[Array, " B"],
    sinks: Float[Array, " N"] | None = None,
    *,
    group_reduce: str,
    implementation: str | None = None,
) -> Float[Array, "B K P"]:
    """The attention that the newest query gives to each of the selected pages, which alone are read.

    Args:
      q: the newest query of every head, rotary embedding applied.
      pages: keys and values of one layer.
      page_ids: the selected pages, as `retro_attention` takes them.
      counts: how many there are; the mass of all others is 0.
      positions: the newest position.
      sinks: see `attention_mass`.
      group_reduce: name in `GROUP_REDUCE`.
      implementation: see `pallas_kernels.dispatch`.
    """
    check_pages(pages)
    return dispatch(
        "selected_mass",
        implementation,
        {"xla": mass.selected_mass},
        ((*by_sequence(1, 1, 1, 1, None), BY_HEAD), *by_sequence(1)),
        q,
        pages,
        page_ids,
        counts,
        positions,
        sinks,
        group_reduce=group_reduce,
    )


def settle_blocks(
    block_values: Float[Array, "B K blocks D"],
    pages: Pages,
    first: Int[Array, " B"],
    settled: Int[Array, " B"],
    *,
    block_pages: int,
    count: int,
    implementation: str | None = None,
) -> Float[Array, "B K blocks D"]:
    """The mean values of blocks, computed from their pages where they have settled.

    Args:
      block_values: one mean value for every `block_pages` pages; unsettled ones have no meaning.
      pages: keys and values of one layer.
      first: the block of this token position is the first to look at; may be negative.
      settled: tokens that will not change again.
      block_pages: pages in a block.
      count: blocks to look at.
      implementation: see `pallas_kernels.dispatch`.
    """
    check_pages(pages)
    return dispatch(
        "settle_blocks",
        implementation,
        {"xla": residual.settle_blocks},
        (by_sequence(1, 1, None, None), *by_sequence(1)),
        block_values,
        pages,
        first,
        settled,
        block_pages=block_pages,
        count=count,
    )


def attend_estimates(
    q: Float[Array, "B W N D"],
    statistics: Statistics,
    block_values: Float[Array, "B K blocks D"],
    last_loaded: Int[Array, "B K P"],
    positions: Int[Array, "B W"],
    settled: Int[Array, " B"],
    *,
    page_size: int,
    block_pages: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"]]:
    """Attention to the estimates of all pages in settled blocks that are not in a slot's union.

    Args:
      q: queries of the window's slots, oldest first, rotary embedding applied.
      statistics: mean keys.
      block_values: see `settle_blocks`.
      last_loaded: the position whose step loaded the page last, this step's loads included: a page is in the
        union of the slot at position p if it was loaded at p or later.
      positions: each slot's position, -1 for a slot without a query.
      settled: tokens older than every query of the window.
      page_size: S.
      block_pages: pages in a block.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      o and lse, as `retro_attention` returns them: 0 and -inf where there is nothing to estimate.
    """
    return dispatch(
        "attend_estimates",
        implementation,
        {"xla": residual.attend_estimates},
        (by_sequence(2, 1, 1, 1, None, None), by_sequence(2, 2)),
        q,
        statistics,
        block_values,
        last_loaded,
        positions,
        settled,
        page_size=page_size,
        block_pages=block_pages,
    )
