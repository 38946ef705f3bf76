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
from retro_jax.inputs import check_bools, check_ids, check_ints
from retro_jax.layers import Watch, dense_layer, sparse_layer, window_slots
from retro_jax.mlp import step_mailbox
from retro_jax.models import transformer
from retro_jax.models.config import ModelConfig
from retro_jax.models.experts import expert_bytes
from retro_jax.models.transformer import Params
from retro_jax.plan import layer_plan
from retro_jax.rectify import rectify
from retro_jax.selection import Selection
from retro_jax.sliding import sliding_layer
from retro_jax.state import DecodeState
from retro_jax.stream import begin, norms, read_whole

Load = tuple[Selection, Int[Array, "B K C"] | None, int]
"""What a sparse layer loaded, from which positions on queries newly attend to it, and the layer's window."""


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

    The layers below the first sparse one run for the newest token only; every layer from there on takes the
    hidden states of the whole window, so that a corrected attention output below overwrites the keys and
    values above it.

    Called in a loop, it keeps a device as busy as `decode` does if no call waits for the one before: leave
    tokens on the device, and read them a step late.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static. That which the state was made with: what a step may load is the state's
        `budget`, which does not follow another one here.
      state: donate it, so that the cache is updated in place.
      tokens: the newest token ids, at position `state.length`. Within a trace nothing tells that one is
        outside the vocabulary.
      active: sequences to decode; the others keep their state. None: all.

    Returns:
      The new state and float32 logits of the token after the newest; without meaning for a sequence that
      is not active. A sequence without room (`state.room`: the cache is full, or the model has no further
      position) keeps its state, and its logits are NaN.

    Raises:
      ValueError: tokens or active are not one for each sequence of the state, or the state was made with
        another configuration or model; outside of a trace, also for an id outside the vocabulary.
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
    state.check_made_by(model, config)
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    active = check_bools(active, tokens.shape, "active", "one for each sequence of the state")
    fits = state.room(model) > 0
    refused, active = active & ~fits, active & fits
    check_ids(tokens, active, model)
    slots = window_slots(config, state, active)
    plan = layer_plan(model, config)
    first = plan.first_sparse
    before = norms(params)
    stack = list(zip(params.layers, before[1:], model.layers, state.layers, plan.rings, strict=True))

    stream = begin(transformer.embed(params, model, tokens[:, None]), before[0], model)
    layers, watched, experts = [], [], []
    mailbox = step_mailbox(model, config, tokens.shape[0])
    by, newest = config.implementation, active[:, None]
    for layer, norm, kind, cache, ring in stack[:first]:
        if ring is None:
            token = cache, stream, norm, state.length, newest, by, mailbox
            stream, cache, read = dense_layer(layer, model, kind, config, *token)
        else:
            token = stream, norm, state.length, newest, newest
            stream, cache, read = sliding_layer(layer, model, kind, ring, cache, *token, by, mailbox)
        layers.append(cache)
        experts.append(read)

    if config.slots > 1:
        stream = begin(jnp.concatenate([state.hidden, stream.x], axis=1), before[first], model)
    hidden = jnp.where(active[:, None, None], stream.x[:, 1:], state.hidden)
    positions, loads, loaded = slots.positions, [], None
    for index, (layer, norm, kind, cache, ring) in enumerate(stack[first:], start=first):
        # What lies above the layers that revise has only the newest query.
        window = plan.windows[index]
        if window < stream.x.shape[1]:
            stream, slots = stream.last(window), slots.last(window)
        # In the first sparse layer only the newest token's keys and values are new.
        write = slots.valid if config.overwrite and index > first else slots.newest
        if ring is not None:
            queries = stream, norm, slots.start, slots.valid, write
            stream, cache, read = sliding_layer(layer, model, kind, ring, cache, *queries, by, mailbox)
            layers.append(cache)
            experts.append(read)
            continue
        below = None if plan.anchors[index] else loaded
        queries = stream, norm, slots, write, index, below, watch, mailbox
        stream, cache, loaded, attending, seen, read = sparse_layer(
            layer, model, kind, config, cache, *queries
        )
        layers.append(cache)
        experts.append(read)
        loads.append((loaded, attending, window))
        watched.append(seen)

    stream = read_whole(stream)
    state = state.replace(
        length=state.length + active,
        decoded=jnp.minimum(state.decoded + active, config.slots - 1),
        hidden=hidden,
        layers=tuple(layers),
        metrics=_metrics(model, config, state, active, positions, loads).replace(
            expert_bytes=_expert_bytes(model, experts)
        ),
    )
    logits = transformer.head(params, model, stream.h[:, -1:])[:, 0]
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
    positions: Int[Array, "B W"],
    loads: list[Load],
) -> StepMetrics:
    """What this step attended to, loaded and read; see `StepMetrics`."""
    plan = layer_plan(model, config)
    by_age = jnp.flip(_pages_attended(positions, loads), axis=1) / max(plan.num_sparse, 1)
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
    tokens = plan.num_dense * context + plan.in_rings(context) + plan.num_sparse * config.page_size * loaded
    vectors = 2 * tokens * cached
    fresh = sum((selection.fresh for selection, _, _ in loads), jnp.zeros(active.shape, jnp.int32))
    vectors += fresh * by_page
    kv_bytes = vectors.astype(jnp.float32) * model.head_dim * itemsize * model.num_kv_heads
    return StepMetrics(pages_attended=by_age, pages_loaded=loaded, kv_bytes=kv_bytes)


def _expert_bytes(model: ModelConfig, read: list[Float[Array, " B"] | None]) -> Float[Array, " B"] | None:
    """Bytes of the experts that the layers have read; None where no layer has any."""
    counts = [count for count in read if count is not None]
    return sum(counts) * expert_bytes(model) if counts else None


def _pages_attended(positions: Int[Array, "B W"], loads: list[Load]) -> Float[Array, "B W"]:
    """Pages that each slot newly attended to, the mean over KV heads, summed over layers.

    Those of all layers are counted at once: each count by itself would be launched in each layer.
    """
    B, W = positions.shape
    if not loads:
        return jnp.zeros((B, W))
    newest = jnp.where(positions[:, -1:] >= 0, sum(selection.counts for selection, _, _ in loads), 0)
    older = jnp.zeros((*newest.shape, W - 1), jnp.int32)
    for window in {window for *_, window in loads if window > 1}:
        alike = [(selection.counts, own) for selection, own, other in loads if other == window]
        first = jnp.concatenate([own for _, own in alike], axis=2)
        selected = [jnp.arange(own.shape[2]) < counts[..., None] for counts, own in alike]
        newly = first[:, :, None] <= positions[:, None, -window:-1, None]
        newly &= jnp.concatenate(selected, axis=2)[:, :, None]
        counts = jnp.sum(newly, axis=-1, dtype=jnp.int32)
        older += jnp.pad(counts, ((0, 0), (0, 0), (W - window, 0)))
    return jnp.mean(jnp.concatenate([older, newest[..., None]], axis=-1), axis=1, dtype=jnp.float32)


def full_cache_bytes(
    model: ModelConfig, config: DecodeConfig, context: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Bytes of all keys and values that a cache holds of `context` tokens, their scales included."""
    vector = vector_bytes(model.head_dim, config.cache_dtype or model.dtype)
    plan = layer_plan(model, config)
    tokens = (plan.num_dense + plan.num_sparse) * context.astype(jnp.float32) + plan.in_rings(context)
    return tokens * (2 * model.num_kv_heads * vector)
