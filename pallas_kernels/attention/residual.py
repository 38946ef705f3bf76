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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import attend, fold_rows, rows_of_slots, unfold_rows
from pallas_kernels.layout import VALUES
from pallas_kernels.pages import Pages, dequantized
from pallas_kernels.statistics import Statistics


def settle_blocks(
    block_values: Float[Array, "B K blocks D"],
    pages: Pages,
    first: Int[Array, " B"],
    settled: Int[Array, " B"],
    *,
    block_pages: int,
    count: int,
) -> Float[Array, "B K blocks D"]:
    """See `pallas_kernels.attention.api.settle_blocks`."""
    B, _, blocks, _ = block_values.shape
    S = pages.shape[4]
    size = block_pages * S
    block = first[:, None] // size + jnp.arange(count)
    whole = (block >= 0) & ((block + 1) * size <= settled[:, None]) & (block < blocks)
    page = jnp.clip(block, 0, blocks - 1)[..., None] * block_pages + jnp.arange(block_pages)
    sequence = jnp.arange(B)[:, None, None]
    values = jax.tree.map(lambda array: array[sequence, :, page, VALUES], pages)
    values = dequantized(values).astype(jnp.float32)  # [B, count, block_pages, K, S, D]
    means = jnp.mean(values, axis=(2, 4)).astype(block_values.dtype)
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
    """See `pallas_kernels.attention.api.attend_estimates`."""
    W, N = q.shape[1:3]
    K, P = last_loaded.shape[1:]
    slot = positions[:, None, :, None]  # [B, 1, W, 1]
    complete = settled // (block_pages * page_size) * block_pages
    missed = (last_loaded[:, :, None] < slot) & (jnp.arange(P) < complete[:, None, None, None])
    o, lse = attend(
        fold_rows(q, K),
        statistics.at_float32()[:, :, :, 0],
        jnp.repeat(block_values, block_pages, axis=2)[:, :, :P],
        rows_of_slots(missed, N // K),
    )
    return unfold_rows(o, W), unfold_rows(lse, W) + jnp.log(page_size)  # each stands for that many tokens
