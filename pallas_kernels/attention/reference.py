"""Attention over pages in plain `jnp`: the definition, and the path on the CPU.

Everything is made of two functions: `attend`, softmax attention that also returns its log-sum-exp, and
`merge`, which joins attention over two disjoint sets of keys. Softmax is in float32. Keys and values
in 8 bits are taken as the numbers that they stand for, in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.pages import Pages, gather_pages, slice_pages

_BLOCK_TOKENS = 1024  # of dense attention: a block of keys and values stays in a core's cache


def attend(
    q: Float[Array, "B K R D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    mask: Bool[Array, " B #K R T"],
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R"]]:
    """Softmax attention of R rows over the keys that `mask` allows, and its log-sum-exp.

    A row without any allowed key gives o = 0 and lse = -inf. Keys that no row may see may hold anything.
    """
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bkrd,bktd->bkrt", q * scale, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    v = jnp.where(jnp.any(mask, axis=2)[..., None], v, 0)  # 0 * NaN is NaN
    o = jnp.einsum("bkrt,bktd->bkrd", weights, v.astype(jnp.float32))
    return o / jnp.where(total == 0.0, 1.0, total), (highest + jnp.log(total))[..., 0]


def merge(
    o_a: Float[Array, "*rows D"],
    lse_a: Float[Array, "*rows"],
    o_b: Float[Array, "*rows D"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    Either side may be empty (lse = -inf); if both are, o = 0 and lse = -inf.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    reference = jnp.where(jnp.isfinite(lse), lse, 0.0)
    share_a, share_b = (jnp.exp(part - reference)[..., None] for part in (lse_a, lse_b))
    return share_a * o_a + share_b * o_b, lse


def merge_sinks(
    o: Float[Array, "*rows N D"], lse: Float[Array, "*rows N"], sinks: Float[Array, " N"] | None
) -> Float[Array, "*rows N D"]:
    """Attention in which each head's sink has taken its weight: `merge` with o = 0, the last of a query.

    Args:
      o: attention outputs.
      lse: their log-sum-exp, without the sink.
      sinks: logits; None: there are none.
    """
    if sinks is None:
        return o
    return o * jax.nn.sigmoid(lse - sinks.astype(jnp.float32))[..., None]


def fold_rows(q: Float[Array, "B W N D"], num_kv_heads: int) -> Float[Array, "B K R D"]:
    """Query heads by KV head, with slots and the heads of a group folded into R = W * G rows."""
    B, W, N, D = q.shape
    q = q.reshape(B, W, num_kv_heads, N // num_kv_heads, D)
    return q.transpose(0, 2, 1, 3, 4).reshape(B, num_kv_heads, -1, D)


def unfold_rows(rows: Float[Array, "B K R *D"], slots: int) -> Float[Array, "B W N *D"]:
    """The inverse of `fold_rows`."""
    B, K, R, *D = rows.shape
    rows = jnp.moveaxis(rows.reshape(B, K, slots, R // slots, *D), 2, 1)
    return rows.reshape(B, slots, -1, *D)


def rows_of_slots(mask: Bool[Array, "B K W T"], group: int) -> Bool[Array, "B K R T"]:
    """A mask by slot as a mask by folded row."""
    return jnp.repeat(mask, group, axis=2)


def tokens_of_pages(mask: Bool[Array, "B K C"], page_size: int) -> Bool[Array, "B K tokens"]:
    """A mask by page as a mask by token."""
    return jnp.repeat(mask, page_size, axis=2)


def retro_attention(
    q: Float[Array, "B W N D"],
    pages: Pages,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    last_loaded: Int[Array, "B K P"],
    positions: Int[Array, "B W"],
    cached_o: Float[Array, "B older N D"],
    cached_lse: Float[Array, "B older N"],
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"], Int[Array, "B K P"]]:
    """See `pallas_kernels.attention.api.retro_attention`."""
    B, W, N, _ = q.shape
    K, P, _, S, D = pages.shape[1:]
    ids = jnp.clip(page_ids, 0, P - 1)
    loaded = gather_pages(pages, ids)
    k = loaded[:, :, :, KEYS].reshape(B, K, -1, D)
    v = loaded[:, :, :, VALUES].reshape(B, K, -1, D)

    selected = jnp.arange(ids.shape[-1]) < counts[..., None]
    slot = positions[:, None, :, None]  # [B, 1, W, 1]
    visible = selected[:, :, None] & (jnp.take_along_axis(last_loaded, ids, axis=2)[:, :, None] < slot)
    causal = ids[:, :, None, :, None] * S + jnp.arange(S) <= slot[..., None]
    mask = (visible[..., None] & causal).reshape(B, K, W, -1)

    o, lse = attend(fold_rows(q, K), k, v, rows_of_slots(mask, N // K))
    o, lse = unfold_rows(o, W), unfold_rows(lse, W)
    older = merge(o[:, :-1], lse[:, :-1], cached_o, cached_lse)
    o, lse = (jnp.concatenate([past, new[:, -1:]], axis=1) for past, new in zip(older, (o, lse), strict=True))

    b, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    loads = jnp.where(selected, ids, P)  # P lies outside: dropped
    last_loaded = last_loaded.at[b, head, loads].set(positions[:, -1, None, None], mode="drop")
    return o, lse, last_loaded


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
    attention: Callable[..., tuple[Array, Array, Array]] = retro_attention,
) -> tuple[
    Float[Array, "B W N D"],
    Float[Array, "B W N"],
    Int[Array, "B K P"],
    Float[Array, "B older N D"],
    Float[Array, "B older N"],
    Int[Array, "B K C"],
]:
    """See `pallas_kernels.attention.api.attend_window`; `attention` is what computes `retro_attention`."""
    first = first_attending(page_ids, last_loaded, pages.shape[4])
    # That was read before attention overwrites it: else XLA would keep a copy.
    first, last_loaded = lax.optimization_barrier((first, last_loaded))
    o, lse, last_loaded = attention(q, pages, page_ids, counts, last_loaded, positions, cached_o, cached_lse)
    cached_o = jnp.where(active[:, None, None, None], o[:, 1:], cached_o)
    cached_lse = jnp.where(active[:, None, None], lse[:, 1:], cached_lse)
    return o.astype(dtype), lse, last_loaded, cached_o, cached_lse, first


def first_attending(
    page_ids: Int[Array, "B K C"], last_loaded: Int[Array, "B K P"], page_size: int
) -> Int[Array, "B K C"]:
    """The position from which on queries attend to each of these pages and have not before.

    Those are the positions after the step that loaded the page last, within the page or behind it.
    """
    return jnp.maximum(jnp.take_along_axis(last_loaded, page_ids, axis=2) + 1, page_ids * page_size)


def dense_attention(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None = None,
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, "B T N D"]:
    """See `pallas_kernels.attention.api.dense_attention`."""
    return attend_pages(q, pages, positions, None, sinks).astype(dtype)


def attend_pages(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    allowed: Bool[Array, "B K P"] | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N D"]:
    """See `pallas_kernels.attention.api.attend_pages`."""
    limit = positions[:, None, :, None]

    def visible(key, of_block):
        if allowed is None:
            return key <= limit
        return (key <= limit) & tokens_of_pages(of_block(allowed), pages.shape[4])[:, :, None]

    return merge_sinks(*attend_blocks(q, pages, jnp.max(positions), visible), sinks)


def attend_blocks(
    q: Float[Array, "B T N D"],
    pages: Pages,
    last: Int[Array, ""] | int,
    visible: Callable[[Array, Callable[[Array], Array]], Array],
    block: int | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """Attention over pages up to the one of the token at `last`, block by block, and its log-sum-exp.

    Args:
      q: queries.
      pages: keys and values of one layer.
      last: number of a token, in the order of the pages.
      visible: (numbers of a block's tokens, what takes the part of an array[B, K, P] that is of the block's
        pages) -> which of them each query sees, [B, #K, T, tokens].
      block: pages of a block; None: as many as stay in a core's cache.
    """
    B, T, N, _ = q.shape
    K, P, _, S, D = pages.shape[1:]
    block = min(max(_BLOCK_TOKENS // S, 1), P) if block is None else block
    rows = fold_rows(q, K)

    def add_block(index, carry):
        first = jnp.minimum(index * block, P - block)  # the last block may reach back into the one before
        loaded = slice_pages(pages, first, block)
        k = loaded[:, :, :, KEYS].reshape(B, K, -1, D)
        v = loaded[:, :, :, VALUES].reshape(B, K, -1, D)
        token = first * S + jnp.arange(block * S)
        mask = (token >= index * block * S) & visible(
            token, lambda array: lax.dynamic_slice_in_dim(array, first, block, axis=2)
        )
        return merge(*carry, *attend(rows, k, v, rows_of_slots(mask, N // K)))

    empty = jnp.zeros(rows.shape, jnp.float32), jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32)
    o, lse = lax.fori_loop(0, last // (block * S) + 1, add_block, empty)
    return unfold_rows(o, T), unfold_rows(lse, T)
