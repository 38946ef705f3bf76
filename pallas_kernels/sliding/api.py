"""Public functions of sliding-window attention over a ring of pages.

Pages are as everywhere (`pallas_kernels.pages`): for at least `ring` tokens, or for all that there will be.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import dense_attention
from pallas_kernels.attention.gpu import kernels as mosaic_gpu
from pallas_kernels.dispatch import BY_HEAD, by_sequence, dispatch
from pallas_kernels.pages import Pages, QuantizedPages, check_pages
from pallas_kernels.sliding import reference
from pallas_kernels.update import update_pages

Tokens = Float[Array, "B T K 2 D"] | QuantizedPages
"""Keys and values of some tokens as they lie in pages."""


def window_attention(
    q: Float[Array, "B W N D"],
    pages: Pages,
    positions: Int[Array, "B W"],
    sinks: Float[Array, " N"] | None = None,
    *,
    window: int,
    ring: int,
    implementation: str | None = None,
) -> Float[Array, "B W N D"]:
    """Attention of a step's queries to the latest `window` keys of each, float32.

    For one query and a ring of as many places as the window has tokens, that is dense attention over the
    places that were written, and runs through its kernels. More have one on Hopper GPUs.

    Args:
      q: queries of the window's slots, oldest first, rotary embedding applied.
      pages: the ring of one layer, the keys and values of the queries included; what was never written may
        hold anything.
      positions: each query's position, -1 for none. The highest is the last that was written.
      sinks: see `dense_attention`.
      window: keys that a query attends to, its own included.
      ring: places; at least `window` and as many as the oldest query lies behind the newest.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: query heads are not a multiple of KV heads, or the ring is too small.
    """
    _check(q, pages, window, ring, q.shape[1])
    if q.shape[1] == 1 and ring == window:
        places = jnp.minimum(positions, ring - 1)
        return dense_attention(q, pages, places, sinks, implementation=implementation)
    return dispatch(
        "sliding-window attention in a ring of more places than its window",
        implementation,
        {"xla": reference.window_attention, "mosaic_gpu": mosaic_gpu.window_attention},
        ((*by_sequence(2, 1, None), BY_HEAD), *by_sequence(2)),
        q,
        pages,
        positions,
        sinks,
        window=window,
        ring=ring,
    )


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
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """Attention of consecutive tokens to their window, in the ring and among themselves, float32.

    For any number of tokens: they are not in the ring yet, where they may overwrite what the first of them
    see. What an earlier pass has left there of these positions and later ones is not read; what that has
    overwritten is out of sight if the ring has `window` - 1 places and one for each of them, or more.

    Args:
      q: queries, rotary embedding applied.
      k: keys of the same tokens.
      v: their values.
      pages: the ring of one layer, with the tokens before these.
      start: position of the first token.
      positions: each token's position, -1 for a token that is none.
      sinks: see `dense_attention`.
      window: keys that a query attends to, its own included.
      ring: places.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: as for `window_attention`.
    """
    _check(q, pages, window, ring, 1)
    return dispatch(
        "sliding-window attention of a chunk",
        implementation,
        {"xla": reference.chunk_attention},
        ((*by_sequence(2, 2, 2, 1, None, None), BY_HEAD), *by_sequence(2)),
        q,
        k,
        v,
        pages,
        start,
        positions,
        sinks,
        window=window,
        ring=ring,
    )


def update_ring(
    pages: Pages,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    ring: int,
    implementation: str | None = None,
) -> Pages:
    """Writes keys and values of T consecutive positions into a ring; of more than `ring`, the last.

    Args:
      pages: the ring of one layer; donate it to update in place.
      k: keys, rotary embedding applied.
      v: values.
      start: position of the first of the T tokens; may be negative where the first ones are not written.
      write: which of them to write.
      ring: places.
      implementation: see `pallas_kernels.dispatch`.
    """
    T = write.shape[1]
    if ring < T:
        end = jnp.max(jnp.where(write, jnp.arange(1, T + 1), 0), axis=1)
        first = jnp.maximum(end - ring, 0)
        rows, T = first[:, None] + jnp.arange(ring), ring
        k, v = (jnp.take_along_axis(tokens, rows[..., None, None], axis=1) for tokens in (k, v))
        start, write = start + first, jnp.take_along_axis(write, rows, axis=1)
    for place, some in ring_places(start, write, ring):
        pages, _ = update_pages(pages, None, k, v, place, some, implementation=implementation)
    return pages


def ring_places(
    start: Int[Array, " B"], write: Bool[Array, "B T"], ring: int
) -> list[tuple[Int[Array, " B"], Bool[Array, "B T"]]]:
    """Places of T consecutive positions, `ring` at most: the first one's, and which to write from there.

    Once up to the last place of the ring and once from its first one on; that place then is negative.
    """
    T, place = write.shape[1], start % ring
    if T == 1:
        return [(place, write)]
    ahead = place[:, None] + jnp.arange(T) < ring
    return [(place, write & ahead), (place - ring, write & ~ahead)]


def read_ring(pages: Pages, start: Int[Array, " B"], count: int, *, ring: int) -> Tokens:
    """What lies in the places of `count` consecutive positions, as it lies there."""
    sequence, page, place = _places(pages, start, count, ring)
    return jax.tree.map(lambda array: array[sequence, :, page, :, place], pages)


def restore_ring(
    pages: Pages, saved: Tokens, start: Int[Array, " B"], which: Bool[Array, "B count"], *, ring: int
) -> Pages:
    """Puts what `read_ring` has read back, of the positions among them that `which` tells."""
    sequence, page, place = _places(pages, start, which.shape[1], ring)
    page = jnp.where(which, page, pages.shape[2])  # lies outside: dropped
    return jax.tree.map(
        lambda array, old: array.at[sequence, :, page, :, place].set(old, mode="drop"), pages, saved
    )


def _places(pages, start, count, ring):
    """Sequence, page and place within it of consecutive positions."""
    place, size = (start[:, None] + jnp.arange(count)) % ring, pages.shape[4]
    return jnp.arange(len(start))[:, None], place // size, place % size


def _check(q, pages, window, ring, slots):
    check_pages(pages)
    if q.shape[2] % pages.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {pages.shape[1]} KV heads")
    if window < 1 or ring < window + slots - 1:
        raise ValueError(
            f"a ring of {ring} tokens is too small for {slots} queries with a window of {window}; it takes "
            f"{max(window, 1) + slots - 1}"
        )
