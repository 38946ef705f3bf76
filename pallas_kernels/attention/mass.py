"""How much attention pages get: the sums of softmax weights over their tokens, in plain `jnp` everywhere.

What eviction and exact selection decide by. Weights are those of softmax over all keys that a query may see;
those of the query heads that share a KV head are reduced to one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.reference import fold_rows, tokens_of_pages
from pallas_kernels.layout import KEYS
from pallas_kernels.pages import Pages, gather_pages, slice_pages
from pallas_kernels.scores import GROUP_REDUCE

_BLOCK_TOKENS = 1024


def attention_mass(
    q: Float[Array, "B T N D"],
    pages: Pages,
    positions: Int[Array, "B T"],
    allowed: Bool[Array, "B K P"],
    sinks: Float[Array, " N"] | None = None,
    *,
    group_reduce: str,
) -> Float[Array, "B K P"]:
    """See `pallas_kernels.attention.api.attention_mass`."""
    (B, T, N, _), (K, P, _, S, _) = q.shape, pages.shape[1:]
    block = min(max(_BLOCK_TOKENS // S, 1), P)
    rows = fold_rows(q, K)
    limit = jnp.repeat(positions, N // K, axis=1)[:, None, :, None]

    def logits(index):
        first = jnp.minimum(index * block, P - block)  # the last block may reach back into the one before
        keys = slice_pages(pages, first, block)[:, :, :, KEYS].reshape(B, K, -1, q.shape[3])
        key = first * S + jnp.arange(block * S)
        mask = (key >= index * block * S) & (key <= limit)
        mask &= tokens_of_pages(lax.dynamic_slice_in_dim(allowed, first, block, axis=2), S)[:, :, None]
        return first, _logits(rows, keys, mask)

    def add_lse(index, lse):
        return jnp.logaddexp(lse, jax.nn.logsumexp(logits(index)[1], axis=-1))

    def add_mass(index, mass):
        first, scores = logits(index)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
        by_page = weights.reshape(B, K, T, N // K, block, S).sum(axis=-1)
        more = GROUP_REDUCE[group_reduce](by_page, axis=3).sum(axis=2)
        before = lax.dynamic_slice_in_dim(mass, first, block, axis=2)
        return lax.dynamic_update_slice_in_dim(mass, before + more, first, axis=2)

    blocks = jnp.max(positions) // (block * S) + 1
    lse = jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32)
    if sinks is not None:
        lse = jnp.broadcast_to(jnp.tile(sinks.astype(jnp.float32).reshape(K, -1), T), lse.shape)
    lse = lax.fori_loop(0, blocks, add_lse, lse)
    return lax.fori_loop(0, blocks, add_mass, jnp.zeros((B, K, P), jnp.float32))


def selected_mass(
    q: Float[Array, "B N D"],
    pages: Pages,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    positions: Int[Array, " B"],
    sinks: Float[Array, " N"] | None = None,
    *,
    group_reduce: str,
) -> Float[Array, "B K P"]:
    """See `pallas_kernels.attention.api.selected_mass`."""
    (B, N, D), (K, P, _, S, _) = q.shape, pages.shape[1:]
    C = page_ids.shape[2]
    ids = jnp.clip(page_ids, 0, P - 1)
    keys = gather_pages(pages, ids)[:, :, :, KEYS]
    selected = (jnp.arange(C) < counts[..., None])[..., None]
    mask = selected & (ids[..., None] * S + jnp.arange(S) <= positions[:, None, None, None])
    scores = _logits(q.reshape(B, K, N // K, D), keys.reshape(B, K, -1, D), mask.reshape(B, K, 1, -1))
    if sinks is not None:
        logits = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, -1, 1), (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, logits], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : C * S]
    weights = jnp.where(mask.reshape(B, K, 1, -1), weights, 0.0)
    mass = GROUP_REDUCE[group_reduce](weights.reshape(B, K, N // K, C, S).sum(axis=-1), axis=2)
    b, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    return jnp.zeros((B, K, P), jnp.float32).at[b, head, ids].add(mass)


def _logits(
    rows: Float[Array, "B K R D"], keys: Float[Array, "B K T D"], mask: Bool[Array, " B #K #R T"]
) -> Float[Array, "B K R T"]:
    scale = rows.shape[-1] ** -0.5
    scores = jnp.einsum("bkrd,bktd->bkrt", rows * scale, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores, -jnp.inf)
