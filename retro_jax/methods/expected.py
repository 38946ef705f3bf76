"""Expected attention (arXiv 2510.00636): what later queries are expected to attend to stays of a prompt.

They are taken as normal, with mean m and covariance C of the prompt's queries before the rotary embedding,
turned by the mean rotation of the next positions: the expected weight of a key k is the softmax over keys of
m k / sqrt(D) + k C k / 2 D. Tokens are worth their weight times the norm of their value, as in KVPress, the
authors' library. Then the cache grows, as with SnapKV, whose remarks on the budget hold here too.

Differences from the original: pages are kept instead of tokens, by the sum of their tokens' worth; one set
per KV head, by its group's query heads; the first tokens are kept by sink pages, where these are asked for.
The moments are those of the queries themselves, biases and norms included, where KVPress takes hidden states
through the projection alone. A later prompt of a conversation is judged by its own queries, with what was
left of earlier ones. The first `dense_layers` layers keep everything.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import GROUP_REDUCE, KEYS, VALUES
from pallas_kernels.pages import slice_pages
from retro_jax.cache import LayerState, Moments, Prompt
from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction, all_alive
from retro_jax.models.rope import rope_frequencies, rotate
from retro_jax.rules import Rules

FUTURE = 512
"""Positions whose rotations are averaged, from the first decoded token on."""
FIRST = 4
"""Tokens at the beginning that have no part in moments and weights: they are unlike all others."""
_BLOCK_PAGES = 64


def init(rules, model, batch, pages):
    """Nothing evicted, no query seen."""
    N, D = model.num_heads, model.head_dim
    moments = Moments(
        count=jnp.zeros(batch, jnp.int32),
        mean=jnp.zeros((batch, N, D), jnp.float32),
        scatter=jnp.zeros((batch, N, D, D), jnp.float32),
    )
    prompt = Prompt(fresh=jnp.zeros(batch, bool), moments=moments)
    return all_alive(rules, model, batch, pages).replace(prompt=prompt)


def observe(rules, layer, q, positions, sinks):
    """Adds the queries of a chunk to the moments of its prompt."""
    prompt = layer.kept.prompt
    x = q.astype(jnp.float32)
    if rules.rope is not None:
        cos, sin = _angles(rules, positions, q.shape[-1])
        x = rotate(x, cos[:, :, None], -sin[:, :, None])
    counts = positions >= FIRST
    some, more = jnp.any(positions >= 0, axis=1), jnp.sum(counts, axis=1)
    before = jnp.where(prompt.fresh, prompt.moments.count, 0)  # else they are of an earlier prompt
    mean, scatter = prompt.moments.mean, prompt.moments.scatter

    # Moments of the chunk, and of both together (Chan, Golub and LeVeque 1983).
    x = jnp.where(counts[..., None, None], x, 0.0)
    new = jnp.sum(x, axis=1) / jnp.maximum(more, 1)[:, None, None]
    x = jnp.where(counts[..., None, None], x - new[:, None], 0.0)
    spread = jnp.einsum("btni,btnj->bnij", x, x)
    share = (more / jnp.maximum(before + more, 1))[:, None, None]
    apart = new - mean
    both = (before[:, None, None] * share)[..., None]
    moments = Moments(
        count=before + more,
        mean=mean + share * apart,
        scatter=spread
        + jnp.where((before > 0)[:, None, None, None], scatter, 0.0)
        + both * apart[..., :, None] * apart[..., None, :],
    )
    moments = jax.tree.map(
        lambda new, old: jnp.where(some.reshape(-1, *[1] * (old.ndim - 1)), new, old), moments, prompt.moments
    )
    return layer.kept.replace(prompt=prompt.replace(moments=moments, fresh=prompt.fresh | some))


def worth(rules, layer, query, limits):
    """What the pages of a prompt are expected to give, at its end; later steps evict none, and do not ask."""
    ended = jnp.any(layer.kept.prompt.fresh & (query.positions >= 0))
    none = jnp.zeros(layer.kept.alive.shape, jnp.float32)
    return lax.cond(ended, lambda: expected(rules, layer, query.positions), lambda: none)


def expected(rules: Rules, layer: LayerState, positions: Int[Array, " B"]) -> Float[Array, "B K P"]:
    """The expected weights of the tokens before a position times the norms of their values, by page.

    Args:
      rules: of the layer.
      layer: its state, with the moments of the prompt that ended there.
      positions: of the first decoded token, -1 for none.
    """
    moments, alive = layer.kept.prompt.moments, layer.kept.alive
    K, P, _, S, D = layer.pages.shape[1:]
    mean = moments.mean
    covariance = moments.scatter / jnp.maximum(moments.count, 1)[:, None, None, None]
    if rules.rope is not None:
        cos, sin = _angles(rules, positions[:, None] + jnp.arange(FUTURE), D)
        cos, sin = (jnp.mean(of_each, axis=1)[:, None] for of_each in (cos, sin))
        mean = rotate(mean, cos, sin)
        for _ in range(2):  # its rows, then its columns
            covariance = rotate(covariance, cos[:, None], sin[:, None]).swapaxes(-1, -2)
    mean, covariance = (x.reshape(x.shape[0], K, -1, *x.shape[2:]) for x in (mean, covariance))
    block = math.gcd(P, _BLOCK_PAGES)

    def of_block(index):
        held = slice_pages(layer.pages, index * block, block).astype(jnp.float32)
        keys, values = held[:, :, :, KEYS], held[:, :, :, VALUES]
        linear = jnp.einsum("bkgd,bkpsd->bkgps", mean, keys)
        square = jnp.einsum("bkgpsi,bkpsi->bkgps", jnp.einsum("bkgij,bkpsj->bkgpsi", covariance, keys), keys)
        return linear / math.sqrt(D) + square / (2 * D), jnp.linalg.norm(values, axis=-1)

    logits, norms = (
        jnp.moveaxis(blocks, 0, -3).reshape(*blocks.shape[1:-2], P, S)
        for blocks in lax.map(of_block, jnp.arange(P // block))
    )
    token = jnp.arange(P * S).reshape(P, S)
    seen = (token >= FIRST) & (token < positions[:, None, None, None]) & alive[..., None]
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=(-2, -1))
    by_page = jnp.sum(jnp.where(seen[:, :, None], weights * norms[:, :, None], 0.0), axis=-1)
    return GROUP_REDUCE[rules.group_reduce](by_page, axis=2)


def _angles(rules: Rules, positions: Int[Array, "B T"], head_dim: int) -> tuple[Array, Array]:
    """Cosines and sines [B, T, half] of the angles by which positions turn vectors, no factor applied."""
    frequencies, _ = rope_frequencies(rules.rope, head_dim, rules.max_positions)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


EXPECTED = Method(
    name="expected",
    title="Expected attention",
    help="what later queries are expected to attend to stays of the prompt; then the cache grows",
    eviction=Eviction(init=init, priority=worth, observe=observe, grows=True),
)
