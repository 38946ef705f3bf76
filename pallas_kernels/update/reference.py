"""Page update in plain `jnp`: the definition, and the path on the CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS
from pallas_kernels.pages import Pages, QuantizedPages, dequantized, quantize
from pallas_kernels.statistics import STATISTICS, Statistics

Summarize = Callable[[Array, Array, Array], Array]
"""(keys[B, P, K, S, D] of pages, which tokens are there[B, P, S], numbers of the pages[B, P]) -> vectors
[B, P, K, Z, any]; of pages beyond the sequence anything."""


def update_pages(
    pages: Pages,
    statistics: Statistics | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
) -> tuple[Pages, Statistics | None]:
    """See `pallas_kernels.update.api.update_pages`."""
    B, T = write.shape
    P, _, S = pages.shape[2:5]
    sequence = jnp.arange(B)[:, None]
    position = start[:, None] + jnp.arange(T)
    page = jnp.where(write, position // S, P)  # P lies outside: dropped
    entry = jnp.stack([k, v], axis=3)
    if isinstance(pages, QuantizedPages):
        entry = QuantizedPages(*quantize(entry, pages.dtype))
    else:
        entry = entry.astype(pages.dtype)
    pages = jax.tree.map(
        lambda kept, new: kept.at[sequence, :, page, :, position % S].set(new, mode="drop"), pages, entry
    )
    if statistics is not None:
        statistics = refresh_statistics(statistics, pages, start, write)
    return pages, statistics


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
    update: Callable[..., tuple[Pages, Statistics | None]] = update_pages,
) -> tuple[Float[Array, "B T N D"], Pages, Statistics | None]:
    """See `pallas_kernels.update.api.update_from_product`; `update` is what computes `update_pages`."""
    B, T = write.shape
    K, D = pages.shape[1], pages.shape[-1]
    joined = jnp.sum(product[:, :, :T], axis=0, dtype=jnp.float32).astype(dtype)
    if bias is not None:
        joined = joined + bias
    by_part = joined.reshape(B, T, K // part_heads, -1, D)
    q, k, v = (
        heads.reshape(B, T, -1, D) for heads in jnp.split(by_part, (-2 * part_heads, -part_heads), axis=3)
    )
    q, k = (_normed(heads, weight, norm_eps) for heads, weight in ((q, q_norm), (k, k_norm)))
    if q_scale != 1:
        q = (q.astype(jnp.float32) * q_scale).astype(q.dtype)
    if cos is not None:
        q, k = (_rotated(heads, cos[:, :, None], sin[:, :, None]) for heads in (q, k))
    return q, *update(pages, statistics, k, v, start, write)


def _normed(heads, weight, eps):
    if weight is None:
        return heads
    numbers = heads.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(numbers * numbers, axis=-1, keepdims=True) + eps)
    return (numbers * scale * weight.astype(jnp.float32)).astype(heads.dtype)


def _rotated(heads, cos, sin):
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(heads[..., :turned].astype(jnp.float32), 2, axis=-1)
    both = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([both.astype(heads.dtype), heads[..., turned:]], axis=-1)


def refresh_statistics(
    statistics: Statistics,
    pages: Pages,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    summarize: Summarize | None = None,
) -> Statistics:
    """The statistics of the pages that a write touched, computed anew from the pages; see `update_pages`."""
    B, T = write.shape
    P, _, S = pages.shape[2:5]
    sequence = jnp.arange(B)[:, None]
    position = start[:, None] + jnp.arange(T)
    end = jnp.max(jnp.where(write, position + 1, 0), axis=1)[:, None]
    touched = start[:, None] // S + jnp.arange((T + S - 2) // S + 1)
    read = jax.tree.map(lambda array: array[sequence, :, jnp.clip(touched, 0, P - 1)], pages)
    read = dequantized(read)  # [B, touched, K, 2, S, D]
    valid = touched[..., None] * S + jnp.arange(S) < end[..., None]
    statistic = STATISTICS[statistics.kind]
    if summarize is None:
        vectors = statistic.compute(read, jnp.broadcast_to(valid[:, :, None], (*read.shape[:3], S)))
    else:
        vectors = summarize(read[..., KEYS, :, :], valid, touched)
    fresh = statistic.keep(vectors)
    touched = jnp.where((touched >= 0) & (touched * S < end), touched, P)
    return jax.tree.map(
        lambda kept, new: kept.at[sequence, :, touched].set(new.astype(kept.dtype), mode="drop"),
        statistics,
        fresh,
    )
