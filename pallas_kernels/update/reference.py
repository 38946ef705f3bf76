"""Page update in plain `jnp`: the definition, and the path on the CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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
