"""One decode step: the newest token in, logits of the next one out, past tokens revised on the way."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import vector_bytes
from pallas_kernels.settings import under_fixed_settings
from retro_jax.budget import cached_vector, vectors_per_page
from retro_jax.cache import StepMetrics
from retro_jax.config import DecodeConfig
from retro_jax.inputs import check_bools, check_ints
from retro_jax.layers import Watch, dense_layer, sparse_layer, window_slots
from retro_jax.models import transformer
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.plan import layer_plan
from retro_jax.rectify import rectify
from retro_jax.state import DecodeState


@under_fixed_settings
def decode_step(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Decode one token per sequence.

    The dense layers run for the newest token only; every layer above takes the hidden states of the whole
    window, so that a corrected attention output below overwrites the keys and values above it.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: donate it, so that the cache is updated in place.
      tokens: the newest token ids, at position `state.length`.
      active: sequences to decode; the others keep their state. None: all.

    Returns:
      The new state and float32 logits of the token after the newest; without meaning for a sequence that
      is not active. A sequence without room (`state.room`: the cache is full, or the model has no further
      position) keeps its state, and its logits are NaN.

    Raises:
      ValueError: tokens or active are not one for each sequence of the state.
      TypeError: tokens are not whole numbers, or active is not made of truth values.
    """
    return watched_step(params, model, config, state, tokens, active)[:2]


@under_fixed_settings
def watched_step(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
    watch: Watch | None = None,
) -> tuple[DecodeState, Float[Array, "B V"], tuple[Any, ...]]:
    """`decode_step`, and what `watch` returned in each sparse layer, for analyses of what a step decides."""
    tokens = check_ints(tokens, state.length.shape, "tokens", "one for each sequence of the state")
    state.check_cache(config)
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    active = check_bools(active, tokens.shape, "active", "one for each sequence of the state")
    fits = state.room(model) > 0
    refused, active = active & ~fits, active & fits
    slots = window_slots(config, state, active)
    plan = layer_plan(model, config)
    first = plan.first_sparse
    stack = list(zip(params.layers, model.layers, state.layers, strict=True))

    x = transformer.embed(params, tokens[:, None])
    layers, watched = [], []
    for layer, kind, cache in stack[:first]:
        x, cache = dense_layer(
            layer, model, kind, config, cache, x, state.length, active[:, None], config.implementation
        )
        layers.append(cache)

    x = jnp.concatenate([state.hidden, x], axis=1)
    hidden = jnp.where(active[:, None, None], x[:, 1:], state.hidden)
    attended, read = [jnp.zeros(slots.valid.shape)], [jnp.zeros(active.shape, bool)]
    loaded = None
    for index, (layer, kind, cache) in enumerate(stack[first:], start=first):
        # What lies above the layers that revise has only the newest query.
        window = plan.windows[index]
        if window < x.shape[1]:
            x, slots = x[:, -window:], slots.last(window)
        # In the first sparse layer only the newest token's keys and values are new.
        write = slots.valid if config.overwrite and index > first else slots.newest
        below = None if plan.anchors[index] else loaded
        x, cache, loaded, pages, seen = sparse_layer(
            layer, model, kind, config, cache, x, slots, write, index, below, watch
        )
        layers.append(cache)
        attended.append(jnp.pad(pages, ((0, 0), (config.slots - window, 0))))
        read.append(loaded.fresh)
        watched.append(seen)

    state = DecodeState(
        length=state.length + active,
        budget=state.budget,
        decoded=jnp.minimum(state.decoded + active, config.slots - 1),
        hidden=hidden,
        layers=tuple(layers),
        metrics=_metrics(model, config, state, active, attended, read),
        stale=state.stale,
    )
    logits = transformer.logits(params, model, x[:, -1:])[:, 0]
    if config.rectify_every:
        # The cache is rewritten when the step has read it: else XLA would keep a copy for the last layer.
        state, logits = lax.optimization_barrier((state, logits))
        state, rectified = rectify(params, model, config, state, tokens, active)
        whole = jnp.where(rectified, full_cache_bytes(model, config, state.length), 0.0)
        state = state.replace(metrics=state.metrics.replace(kv_bytes=state.metrics.kv_bytes + whole))
    return state, jnp.where(refused[:, None], jnp.nan, logits), tuple(watched)


def _metrics(
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    active: Bool[Array, " B"],
    attended: list[Float[Array, "B W"]],
    read: list[Bool[Array, " B"]],
) -> StepMetrics:
    """What this step attended to, loaded and read; see `StepMetrics`.

    By layer: the pages that each slot newly attended to, and whether pages were scored.
    """
    plan = layer_plan(model, config)
    by_age = jnp.flip(sum(attended), axis=1) / max(plan.num_sparse, 1)
    loaded = by_age[:, 0]  # the newest attends to every page that is loaded

    context = jnp.where(active, state.length + 1, 0)
    scored = -(-context // config.page_size)
    if config.evict:
        scored = jnp.minimum(scored, config.left_pages)
    itemsize = jnp.dtype(model.dtype).itemsize
    cached = cached_vector(config, model.head_dim, itemsize)
    by_page = vectors_per_page(config, model.head_dim, itemsize) * scored
    if config.residual_pages:
        by_page += active * cached  # of a block that settles, a value a step
    vectors = (plan.num_dense * 2 * context + plan.num_sparse * 2 * config.page_size * loaded) * cached
    vectors += sum(read) * by_page
    kv_bytes = vectors.astype(jnp.float32) * model.head_dim * itemsize * model.num_kv_heads
    return StepMetrics(pages_attended=by_age, pages_loaded=loaded, kv_bytes=kv_bytes)


def full_cache_bytes(
    model: ModelConfig, config: DecodeConfig, context: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Bytes of all keys and values of `context` tokens, their scales included."""
    vector = vector_bytes(model.head_dim, config.cache_dtype or model.dtype)
    token = 2 * model.num_layers * model.num_kv_heads * vector
    return context.astype(jnp.float32) * token
