"""What the pages that no load has brought contribute: an estimate, in plain `jnp` everywhere.

A query q that has attended to the pages U (its union) has the exact part

    o_U, lse_U = attention over the tokens of U,

which is all that the output cache keeps and revises. Every other page j of S tokens counts as S copies of
one token: its logit is that of the page's mean key, q . mean(k_j), its value that of a block of pages,

    e_j = q . mean(k_j) / sqrt(D) + log S,    o_E, lse_E = softmax and log-sum-exp of e_j over j not in U,

and the layer's output is the merge of both by log-sum-exp. Since the estimates are never added to the
cached part, none has to be taken back: when a page becomes visible to a past query, it moves from E to U,
exactly, with no subtraction that could cancel. exp being convex, the estimate S exp(q . mean(k_j)) never
exceeds the page's true sum of exp(q . k), so no bound is needed either: what is estimated can only be too
little, and nothing at all is what is assumed without it.

Values are averaged over blocks of pages, since a mean value per page costs more bytes than it earns. Only
settled blocks are estimated: those whose every token is older than all queries of the window. Their keys and
values will not change again, and each of their values is read once, when the block settles.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import fold_rows, rows_of_slots, unfold_rows
from pallas_kernels.layout import VALUES
from pallas_kernels.selection.scores import SCORES
from pallas_kernels.statistics import Statistics


def settle_blocks(
    block_values: Float[Array, "B K blocks D"],
    pages: Float[Array, "B K P 2 S D"],
    first: Int[Array, " B"],
    settled: Int[Array, " B"],
    *,
    block_pages: int,
    count: int,
) -> Float[Array, "B K blocks D"]:
    """The mean values of blocks, computed from their pages where they have settled.

    Args:
      block_values: one mean value for every `block_pages` pages; unsettled ones have no meaning.
      pages: keys and values of one layer.
      first: the block of this token position is the first to look at; may be negative.
      settled: tokens that will not change again.
      block_pages: pages in a block.
      count: blocks to look at.
    """
    B, _, blocks, _ = block_values.shape
    S = pages.shape[4]
    size = block_pages * S
    block = first[:, None] // size + jnp.arange(count)
    whole = (block >= 0) & ((block + 1) * size <= settled[:, None]) & (block < blocks)
    page = jnp.clip(block, 0, blocks - 1)[..., None] * block_pages + jnp.arange(block_pages)
    sequence = jnp.arange(B)[:, None, None]
    values = pages[sequence, :, page, VALUES]  # [B, count, block_pages, K, S, D]
    means = jnp.mean(values.astype(jnp.float32), axis=(2, 4)).astype(block_values.dtype)
    return block_values.at[jnp.arange(B)[:, None], :, jnp.where(whole, block, blocks)].set(means, mode="drop")


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

    Returns:
      o and lse, as `retro_attention` returns them: 0 and -inf where there is nothing to estimate.
    """
    _, W, N, D = q.shape
    K, blocks = block_values.shape[1:3]
    P = blocks * block_pages  # a last, incomplete block never settles
    rows = fold_rows(q, K)
    logits = SCORES["mean_key"].compute(rows, statistics)[..., :P] * D**-0.5 + jnp.log(page_size)

    slot = positions[:, None, :, None]  # [B, 1, W, 1]
    complete = settled // (block_pages * page_size) * block_pages
    missed = (last_loaded[:, :, None, :P] < slot) & (jnp.arange(P) < complete[:, None, None, None])
    logits = jnp.where(rows_of_slots(missed, N // K), logits, -jnp.inf)

    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    by_block = weights.reshape(*weights.shape[:-1], blocks, block_pages).sum(axis=-1)
    values = jnp.where(jnp.any(by_block > 0, axis=2)[..., None], block_values, 0)  # 0 * NaN is NaN
    o = jnp.einsum("bkrp,bkpd->bkrd", by_block, values.astype(jnp.float32))
    o, lse = o / jnp.where(total == 0.0, 1.0, total), (highest + jnp.log(total))[..., 0]
    return unfold_rows(o, W), unfold_rows(lse, W)
