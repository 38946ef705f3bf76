"""A dense pass over consecutive tokens: what prefill, rectification and verification are made of."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from retro_jax.config import DecodeConfig
from retro_jax.layers import dense_layer
from retro_jax.models import transformer
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.plan import layer_plan
from retro_jax.sliding import sliding_chunk
from retro_jax.state import DecodeState
from retro_jax.stream import begin, norms, read_whole


def dense_pass(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Append T tokens by one pass with full attention in every layer, whatever the method.

    Page statistics, and what eviction carries, follow. Empties the window of every sequence that gets tokens.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: where the tokens begin is its length.
      tokens: padded on the right with any token ids.
      lengths: how many of them to append, 0..T; 0 changes nothing in that sequence.

    Returns:
      The new state and float32 logits of the token after the last one; without meaning where the length is 0.
    """
    # Chunks are matters of large matrix products, which XLA does well; the kernels are for a few tokens.
    state, h = dense_hidden(params, model, config, state, tokens, lengths, implementation="xla")
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return state, transformer.head(params, model, jnp.take_along_axis(h, last, axis=1))[:, 0]


def dense_hidden(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    implementation: str | None,
) -> tuple[DecodeState, Float[Array, "B T M"]]:
    """`dense_pass`, with the hidden states that the last layer leaves of every token, normed for the head.

    They have no meaning beyond a sequence's length. `implementation` is that of the operations.
    """
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    first, *behind = norms(params)
    stream = begin(transformer.embed(params, model, tokens), first, model)
    layers = []
    stack = params.layers, behind, model.layers, state.layers, layer_plan(model, config).rings
    for layer, norm, kind, cache, ring in zip(*stack, strict=True):
        tokens = cache, stream, norm, state.length, valid, implementation
        if ring is None:
            stream, cache, _ = dense_layer(layer, model, kind, config, *tokens)
        else:
            stream, cache = sliding_chunk(layer, model, kind, ring, *tokens)
        layers.append(cache)
    stream = read_whole(stream)
    state = state.replace(
        length=state.length + lengths,
        decoded=jnp.where(lengths > 0, 0, state.decoded),
        layers=tuple(layers),
    )
    return state, stream.h
