"""Layers with a sliding window: their cache is a ring of pages, and nothing in it is ever selected."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import (
    Mailbox,
    chunk_attention,
    read_ring,
    restore_ring,
    update_ring,
    window_attention,
)
from pallas_kernels.sliding.api import Tokens
from retro_jax.cache import LayerState
from retro_jax.config import DecodeConfig
from retro_jax.heads import write_ring_heads
from retro_jax.mlp import after_attention
from retro_jax.models import transformer
from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.transformer import LayerParams
from retro_jax.plan import layer_plan
from retro_jax.state import DecodeState


@functools.partial(jax.jit, static_argnames=("model", "kind", "ring", "implementation"))
def sliding_layer(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    ring: int,
    cache: LayerState,
    x: Float[Array, "B W M"],
    start: Int[Array, " B"],
    valid: Bool[Array, "B W"],
    write: Bool[Array, "B W"],
    implementation: str | None,
    mailbox: Mailbox | None = None,
) -> tuple[Float[Array, "B W M"], LayerState, Float[Array, " B"] | None]:
    """A layer with a sliding window in a decode step: each query of the step attends to its own window.

    Args:
      layer: weights.
      model: sizes.
      kind: of this layer.
      ring: tokens that its cache holds.
      cache: this layer's state.
      x: hidden states of all slots as the layer below now sees them.
      start: position of the oldest slot.
      valid: slots that hold a token.
      write: those whose keys and values are written, over stale ones where there are any.
      implementation: of the operations on pages.
      mailbox: for sums over devices; None: XLA's.

    Returns:
      The hidden states, the new state, and what `mlp` says of experts.
    """
    positions = jnp.where(valid, start[:, None] + jnp.arange(x.shape[1]), -1)
    tokens = x, positions, start, write
    q, pages = write_ring_heads(layer, model, kind, ring, cache.pages, *tokens, implementation)
    sizes = {"ring": ring, "implementation": implementation}
    o = window_attention(q, pages, positions, layer.sinks, window=kind.window, **sizes)
    x, experts = after_attention(layer, model, x, o, valid, implementation, mailbox)
    return x, cache.replace(pages=pages), experts


@functools.partial(jax.jit, static_argnames=("model", "kind", "ring", "implementation"))
def sliding_chunk(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    ring: int,
    cache: LayerState,
    x: Float[Array, "B T M"],
    start: Int[Array, " B"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Float[Array, "B T M"], LayerState]:
    """Such a layer in a dense pass over T consecutive tokens, of which there may be more than the ring holds.

    They attend to the ring before they are written, over what the first of them see.
    """
    positions = jnp.where(valid, start[:, None] + jnp.arange(x.shape[1]), -1)
    q, k, v = transformer.qkv(layer, model, kind, x, positions)
    sizes = {"ring": ring, "implementation": implementation}
    tokens = q, k, v, cache.pages, start, positions, layer.sinks
    o = chunk_attention(*tokens, window=kind.window, **sizes)
    # That was read before the ring is overwritten: else XLA would keep a copy.
    pages, o = lax.optimization_barrier((cache.pages, o))
    pages = update_ring(pages, k, v, start, valid, **sizes)
    x, _ = after_attention(layer, model, x, o, valid, implementation)
    return x, cache.replace(pages=pages)


def read_rings(
    model: ModelConfig, config: DecodeConfig, state: DecodeState, count: int
) -> tuple[DecodeState, tuple[Tokens | None, ...]]:
    """What the next `count` tokens will overwrite in each ring; None for layers without one."""
    layers, found = [], []
    for layer, ring in zip(state.layers, layer_plan(model, config).rings, strict=True):
        read = None
        if ring is not None:
            read = read_ring(layer.pages, state.length, count, ring=ring)
            # That was read before drafts overwrite it: else XLA would keep a copy.
            pages, read = lax.optimization_barrier((layer.pages, read))
            layer = layer.replace(pages=pages)
        layers.append(layer)
        found.append(read)
    return state.replace(layers=tuple(layers)), tuple(found)


def restore_rings(
    model: ModelConfig,
    config: DecodeConfig,
    layers: tuple[LayerState, ...],
    overwritten: tuple[Tokens | None, ...],
    start: Int[Array, " B"],
    which: Bool[Array, "B count"],
) -> tuple[LayerState, ...]:
    """The layers with what `read_rings` has found, in place of the tokens that `which` tells."""
    rings = layer_plan(model, config).rings
    return tuple(
        layer
        if ring is None
        else layer.replace(pages=restore_ring(layer.pages, found, start, which, ring=ring))
        for layer, found, ring in zip(layers, overwritten, rings, strict=True)
    )
