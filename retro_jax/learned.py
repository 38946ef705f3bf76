"""The learned score: how pages are summarised, and how queries meet the summaries.

A page's summary is a linear map of the mean, the highest and the lowest of its keys to d channels, kept in 8
bits with a scale; a query is mapped to d channels too, and their product over the root of d is a logit of the
whole page. Kernels so see mean keys of d channels. Shares of attention are made of the logits, and trained to
be those of full attention by `retro-jax learn`, as SeerAttention-R (arXiv 2506.08889) trains gates of blocks
of 64 tokens.

Position: keys and queries are rotated back to what they were before the rotary embedding, so that a mean is
of contents and not of angles; their d channels are then rotated, by frequencies that are learned too, by the
position of the query and of the middle of the page.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Pages, Statistics, refresh_statistics
from retro_jax.config import DecodeConfig
from retro_jax.models import LayerKind, LayerParams, LearnedScore, ModelConfig
from retro_jax.models.rope import apply_rope, rope_frequencies

NO_ROTATION = 1e-9
"""Radians a position where a layer has no rotary embedding: nothing at any length, with a logarithm."""


def learned_score(layer: LayerParams, config: DecodeConfig) -> LearnedScore | None:
    """The layer's learned score if the configuration selects pages by it.

    Raises:
      ValueError: the weights have none, or one for other pages or with other channels than the
        configuration's.
    """
    if not config.selects_by_learned:
        return None
    found = layer.page_score
    if found is None:
        raise ValueError(
            "score 'learned' was asked for and the model has none; train one by `retro-jax learn`, and give "
            "its folder to `load_score` or --learned"
        )
    for name, has, wanted in (
        ("page_size", found.page_size, config.page_size),
        ("score_channels", found.channels, config.score_channels),
    ):
        if has != wanted:
            raise ValueError(
                f"{name} is {wanted}, but the model's learned score was trained with {has}; use {name} "
                f"{has}, or train another"
            )
    return found


def learned_queries(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    q: Float[Array, "B N D"],
    positions: Int[Array, " B"],
) -> Float[Array, "B N d"]:
    """Queries as they meet summaries of pages, in the dtype of q.

    Args:
      score: of the layer.
      model: sizes.
      kind: of the layer.
      q: rotary embedding applied.
      positions: of the queries.
    """
    contents = q.astype(jnp.float32)[:, None]
    if kind.rope is not None:
        contents = apply_rope(contents, -positions[:, None], kind.rope, model.max_positions)
    mapped = jnp.einsum("bnd,nde->bne", contents[:, 0], score.query) + score.query_bias
    K, N = score.key.shape[0], score.query.shape[0]
    frequencies = jnp.repeat(jnp.exp(score.log_frequencies), N // K, axis=0)
    return _rotated(mapped, positions[:, None].astype(jnp.float32), frequencies).astype(q.dtype)


def page_summaries(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    keys: Float[Array, "B P K S D"],
    valid: Bool[Array, "B P S"],
    pages: Int[Array, "B P"],
) -> Float[Array, "B P K d"]:
    """Summaries of whole pages, in float32.

    Args:
      score: of the layer.
      model: sizes.
      kind: of the layer.
      keys: rotary embedding applied.
      valid: tokens that are there; others may be anything, NaN included.
      pages: their numbers in the sequence.
    """
    B, P, K, S, D = keys.shape
    contents = jnp.where(valid[:, :, None, :, None], keys.astype(jnp.float32), 0)
    if kind.rope is not None:
        at = (pages[..., None] * S + jnp.arange(S)).reshape(B, -1)
        by_token = jnp.moveaxis(contents, 2, 3).reshape(B, P * S, K, D)
        back = apply_rope(by_token, -at, kind.rope, model.max_positions)
        contents = jnp.moveaxis(back.reshape(B, P, S, K, D), 3, 2)
    there = valid[:, :, None, :, None]
    count = jnp.sum(there, axis=3)
    pooled = jnp.concatenate(
        [
            jnp.sum(contents, axis=3) / jnp.maximum(count, 1),
            jnp.max(jnp.where(there, contents, -jnp.inf), axis=3),
            jnp.min(jnp.where(there, contents, jnp.inf), axis=3),
        ],
        axis=-1,
    )
    pooled = jnp.where(count > 0, pooled, 0)
    mapped = jnp.einsum("bpkd,kde->bpke", pooled, score.key) + score.key_bias
    middle = pages[..., None].astype(jnp.float32) * S + (S - 1) / 2
    return _rotated(mapped, middle, jnp.exp(score.log_frequencies))


def refresh_summaries(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    statistics: Statistics,
    pages: Pages,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    implementation: str | None,
) -> Statistics:
    """The summaries of every page that a write touched; see `refresh_statistics`."""

    def summarize(keys, valid, numbers):
        return page_summaries(score, model, kind, keys, valid, numbers)[..., None, :]

    return refresh_statistics(
        statistics, pages, start, write, summarize=summarize, implementation=implementation
    )


def _rotated(
    x: Float[Array, "*any H d"], positions: Float[Array, "*any 1"], frequencies: Float[Array, "H d/2"]
) -> Float[Array, "*any H d"]:
    """Pairs of channels, one of either half, rotated by position times frequency."""
    angles = positions[..., None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def initial_score(
    model: ModelConfig,
    kind: LayerKind,
    q: Float[Array, "T N D"],
    k: Float[Array, "T K D"],
    page_size: int,
    channels: int,
) -> LearnedScore:
    """Where training begins: the mean key's logit, cut to the pairs of channels by which pages differ most.

    Args:
      model: sizes.
      kind: of the layer.
      q: queries of a text from position 0 on, rotary embedding applied.
      k: its keys, likewise; whole pages.
      page_size: S.
      channels: d, even, at most D.
    """
    T, N, D = q.shape
    K, S = k.shape[1], page_size
    frequencies = jnp.full(D // 2, NO_ROTATION, jnp.float32)
    if kind.rope is not None:
        frequencies = jnp.asarray(rope_frequencies(kind.rope, D, model.max_positions)[0])
    means = jnp.mean(k.astype(jnp.float32).reshape(-1, S, K, D), axis=1)
    some = q.astype(jnp.float32)[:: max(1, T // 64)].reshape(-1, K, N // K, D)
    products = jnp.einsum(
        "qkghe,pkhe->kegqp",
        jnp.stack(jnp.split(some, 2, axis=-1), axis=3),
        jnp.stack(jnp.split(means, 2, axis=-1), axis=2),
    )
    spread = jnp.mean(jnp.var(products, axis=-1), axis=(-2, -1))  # [K, D/2]
    _, pairs = jax.lax.top_k(spread, channels // 2)
    pairs = jnp.sort(pairs, axis=-1)
    picked = jnp.concatenate([pairs, pairs + D // 2], axis=-1)  # [K, d]
    key = jax.nn.one_hot(picked, D, axis=1)  # [K, D, d]
    return LearnedScore(
        query=jnp.repeat(key, N // K, axis=0) * (channels / D) ** 0.5,
        query_bias=jnp.zeros((N, channels)),
        key=jnp.concatenate([key, jnp.zeros((K, 2 * D, channels))], axis=1),
        key_bias=jnp.zeros((K, channels)),
        log_frequencies=jnp.log(frequencies[pairs]),
        page_size=page_size,
    )
