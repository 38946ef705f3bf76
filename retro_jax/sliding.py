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
from retro_jax.stream import Norm, Stream


@functools.partial(jax.jit, static_argnames=("model", "kind", "ring", "implementation"))
def sliding_layer(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    ring: int,
    cache: LayerState,
    stream: Stream,
    norm: Norm,
    start: Int[Array, " B"],
    valid: Bool[Array, "B W"],
    write: Bool[Array, "B W"],
    implementation: str | None,
    mailbox: Mailbox | None = None,
) -> tuple[Stream, LayerState, Float[Array, " B"] | None]:
    """A layer with a sliding window in a decode step: each query of the step attends to its own window.

    Args:
      layer: weights.
      model: sizes.
      kind: of this layer.
      ring: tokens that its cache holds.
      cache: this layer's state.
      stream: hidden states of all slots as the layer below now sees them.
      norm: of what comes behind the layer.
      start: position of the oldest slot.
      valid: slots that hold a token.
      write: those whose keys and values are written, over stale ones where there are any.
      implementation: of the operations.
      mailbox: for sums over devices; None: XLA's.

    Returns:
      The hidden states, the new state, and what `mlp` says of experts.
    """
    positions = jnp.where(valid, start[:, None] + jnp.arange(valid.shape[1]), -1)
    tokens = stream.h, positions, start, write
    q, pages = write_ring_heads(layer, model, kind, ring, cache.pages, *tokens, implementation)
    sizes = {"ring": ring, "implementation": implementation}
    o = window_attention(q, pages, positions, layer.sinks, window=kind.window, **sizes)
    stream, experts = after_attention(layer, model, stream, o, valid, norm, implementation, mailbox)
    return stream, cache.replace(pages=pages), experts


@functools.partial(jax.jit, static_argnames=("model", "kind", "ring", "implementation"))
def sliding_chunk(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    ring: int,
    cache: LayerState,
    stream: Stream,
    norm: Norm,
    start: Int[Array, " B"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Stream, LayerState]:
    """Such a layer in a dense pass over T consecutive tokens, of which there may be more than the ring holds.

    They attend to the ring before they are written, over what the first of them see.
    """
    positions = jnp.where(valid, start[:, None] + jnp.arange(valid.shape[1]), -1)
    joined = transformer.joined_heads(layer, stream.h)
    q, k, v = transformer.split_heads(layer, model, kind, joined, positions)
    sizes = {"ring": ring, "implementation": implementation}
    tokens = q, k, v, cache.pages, start, positions, layer.sinks
    o = chunk_attention(*tokens, window=kind.window, **sizes)
    # That was read before the ring is overwritten: else XLA would keep a copy.
    pages, o = lax.optimization_barrier((cache.pages, o))
    pages = update_ring(pages, k, v, start, valid, **sizes)
    stream, _ = after_attention(layer, model, stream, o, valid, norm, implementation)
    return stream, cache.replace(pages=pages)


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
