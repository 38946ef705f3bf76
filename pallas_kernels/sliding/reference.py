"""Attention over a ring of pages in plain `jnp`: the definition, and the path on the CPU."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import (
    attend,
    attend_blocks,
    fold_rows,
    merge,
    merge_sinks,
    rows_of_slots,
    unfold_rows,
)
from pallas_kernels.pages import Pages, as_kept


def window_attention(
    q: Float[Array, "B W N D"],
    pages: Pages,
    positions: Int[Array, "B W"],
    sinks: Float[Array, " N"] | None = None,
    *,
    window: int,
    ring: int,
) -> Float[Array, "B W N D"]:
    """See `pallas_kernels.sliding.api.window_attention`."""
    # At once: the scores of a few queries are small, and a loop would be launched turn by turn.
    block = pages.shape[2]
    o, lse = _attend_ring(q, pages, positions, jnp.max(positions, axis=1), window, ring, block)
    return merge_sinks(o, lse, sinks)


def chunk_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    pages: Pages,
    start: Int[Array, " B"],
    positions: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None = None,
    *,
    window: int,
    ring: int,
) -> Float[Array, "B T N D"]:
    """See `pallas_kernels.sliding.api.chunk_attention`."""
    (T, N), K = q.shape[1:3], k.shape[2]
    key, query = positions[:, None, None, :], positions[:, None, :, None]
    mask = (key >= 0) & (key <= query) & (key > query - window)
    own = (as_kept(tokens, pages).swapaxes(1, 2) for tokens in (k, v))
    o, lse = attend(fold_rows(q, K), *own, rows_of_slots(mask, N // K))
    before = _attend_ring(q, pages, positions, start - 1, window, ring)
    o, lse = merge(unfold_rows(o, T), unfold_rows(lse, T), *before)
    return merge_sinks(o, lse, sinks)


def _attend_ring(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    newest: Int[Array, " B"],
    window: int,
    ring: int,
    block: int | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """Attention over what a ring holds up to position `newest` (-1: nothing), and its log-sum-exp."""
    newest, query = newest[:, None], positions[:, :, None]

    def visible(place, _):
        key = (newest - (newest - place) % ring)[:, None]
        mask = (place < ring) & (key >= 0) & (key <= query) & (key > query - window)
        return mask[:, None]

    places = pages.shape[2] * pages.shape[4]
    return attend_blocks(q, pages, places - 1, visible, block)
