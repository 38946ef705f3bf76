"""Public functions of the page update."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import BY_HEAD, HEADS, SEQUENCES, by_sequence, dispatch, kernels_of_device
from pallas_kernels.pages import Pages, check_pages
from pallas_kernels.statistics import Statistics, statistic_of
from pallas_kernels.update import reference
from pallas_kernels.update.gpu import kernels as mosaic_gpu
from pallas_kernels.update.tpu import kernels as mosaic_tpu

PARTS = P(None, SEQUENCES, None, HEADS)
"""How a product's parts are spread."""
FEW_TOKENS = 9
"""Tokens of which a kernel makes heads while it writes: those of a window of 8, or 8 drafts and one more.
More are a program that takes long to compile, and save no more launches."""


def update_pages(
    pages: Pages,
    statistics: Statistics | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    implementation: str | None = None,
) -> tuple[Pages, Statistics | None]:
    """Write keys and values of T consecutive positions, over what was there.

    The statistics of every touched page are computed anew from the page, over its tokens up to the last one
    written: a key that is overwritten can shrink them.

    Pages in 8 bits get codes and scales (`pallas_kernels.pages.quantize`) of the tokens that are written, and
    no others change; statistics are those of the keys as they are read back.

    Args:
      pages: keys and values of one layer; donate it to update in place.
      statistics: page statistics of that layer, or None in a layer that has none.
      k: keys, rotary embedding applied.
      v: values.
      start: position of the first of the T tokens; may be negative where the first ones are not written.
      write: which of them to write. A sequence without any is left as it is. The last one written must
        be the last token of the sequence.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The new pages and statistics.

    Raises:
      TypeError: `statistics` are no `Statistics`, or `pages` of no dtype of pages.
      ValueError: they are of an unknown kind, or have arrays of another kind; or scales of pages do not fit.
    """
    check_pages(pages)
    kernels = implementation or kernels_of_device()
    if statistics is not None and not statistic_of(statistics).fused_by(kernels):
        pages, _ = update_pages(pages, None, k, v, start, write, implementation=implementation)
        return pages, refresh_statistics(statistics, pages, start, write, implementation=implementation)
    return dispatch(
        "update_pages",
        implementation,
        {
            "xla": reference.update_pages,
            "mosaic_gpu": mosaic_gpu.update_pages,
            "mosaic_tpu": mosaic_tpu.update_pages,
        },
        (by_sequence(1, 1, 2, 2, None, None), by_sequence(1, 1)),
        pages,
        statistics,
        k,
        v,
        start,
        write,
    )


def update_from_product(
    pages: Pages,
    statistics: Statistics | None,
    product: Float[Array, "parts B rows QKV"],
    bias: Float[Array, " QKV"] | None,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    cos: Float[Array, "B T half"] | None,
    sin: Float[Array, "B T half"] | None,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    part_heads: int,
    norm_eps: float,
    q_scale: float,
    dtype: Any,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N D"], Pages, Statistics | None]:
    """`update_pages` of the keys and values in a joined product, and the queries in it.

    A kernel rounds only what it returns and writes; the reference also what lies between bias, norm, scale
    and rotary embedding. Of more than `FEW_TOKENS` XLA makes the heads.

    Args:
      pages: see `update_pages`, as `statistics`, `start` and `write`.
      statistics: page statistics of the layer.
      product: parts, which are added up in float32, of the product of T tokens' hidden states with the matrix
        in which those of queries, keys and values lie joined: for every `part_heads` KV heads their queries,
        their keys, then their values. Rows of a sequence beyond its T are not read.
      bias: that is added to it; None: there is none.
      q_norm: the weight of the root-mean-square norm of each query; None: they are not normed.
      k_norm: that of keys.
      cos: cosines of each token's angles, times what else scales them, by which the first 2 * half channels
        of queries and keys are rotated, in the half-split layout; None: none are.
      sin: and sines.
      start: position of the first of the T tokens.
      write: which of them to write.
      part_heads: KV heads whose columns lie together.
      norm_eps: of the norms.
      q_scale: by which queries are multiplied.
      dtype: of the queries.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The queries, and the new pages and statistics.

    Raises:
      TypeError: as for `update_pages`.
      ValueError: likewise; or the product's columns are not those of such heads, or its rows are fewer than
        tokens.
    """
    check_pages(pages)
    K, D = pages.shape[1], pages.shape[-1]
    rows, columns = product.shape[2:]
    if K % part_heads or columns % (K * D) or columns < 3 * K * D:
        raise ValueError(
            f"a product of {columns} columns in parts of {part_heads} KV heads is not that of {K} KV heads "
            f"with head_dim {D}; it needs a multiple of {K * D} columns, {3 * K * D} or more, and equal parts"
        )
    if rows < write.shape[1]:
        raise ValueError(f"a product of {rows} rows is not that of {write.shape[1]} tokens; each needs a row")
    kernels = implementation or kernels_of_device()
    fused = statistics is None or statistic_of(statistics).fused_by(kernels)
    sizes = {"part_heads": part_heads, "norm_eps": norm_eps, "q_scale": q_scale, "dtype": jnp.dtype(dtype)}
    update = functools.partial(update_pages, implementation=implementation)
    composed = functools.partial(reference.update_from_product, update=update)
    if write.shape[1] > FEW_TOKENS:
        made = product, bias, q_norm, k_norm, cos, sin
        return composed(pages, statistics, *made, start, write, **sizes)
    q, pages, fresh = dispatch(
        "update_from_product",
        implementation,
        {
            "xla": composed,
            "mosaic_gpu": mosaic_gpu.update_from_product,
        },
        (
            (*by_sequence(1, 1), PARTS, BY_HEAD, P(), P(), *by_sequence(None, None, None, None)),
            by_sequence(2, 1, 1),
        ),
        pages,
        statistics if fused else None,
        product,
        bias,
        q_norm,
        k_norm,
        cos,
        sin,
        start,
        write,
        **sizes,
    )
    if not fused:
        fresh = refresh_statistics(statistics, pages, start, write, implementation=implementation)
    return q, pages, fresh


def refresh_statistics(
    statistics: Statistics,
    pages: Pages,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    summarize: reference.Summarize | None = None,
    implementation: str | None = None,
) -> Statistics:
    """The statistics of every page that a write touched, computed anew from the page.

    Over its tokens up to the last one written, which must be the last token of the sequence.

    Args:
      statistics: page statistics of one layer.
      pages: its keys and values, those that were written included.
      start: position of the first of the T tokens; may be negative where the first ones are not written.
      write: which of them were written. A sequence without any is left as it is.
      summarize: makes the vectors of whole pages, see `reference.Summarize`; None: the statistic itself.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      TypeError: as for `update_pages`.
      ValueError: as for `update_pages`.
    """
    check_pages(pages)
    return dispatch(
        f"refresh_statistics of {statistic_of(statistics).name!r}",
        implementation,
        {"xla": reference.refresh_statistics},
        None if summarize else (by_sequence(1, 1, None, None), *by_sequence(1)),  # it may hold heads' weights
        statistics,
        pages,
        start,
        write,
        summarize=summarize,
    )
