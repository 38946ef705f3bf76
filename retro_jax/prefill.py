"""Prompt tokens into the state, with full attention, chunk by chunk."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from models import transformer
from models.config import ModelConfig
from models.transformer import Params
from retro_jax.config import DecodeConfig
from retro_jax.layers import dense_layer
from retro_jax.state import DecodeState, init_state


def prefill(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    capacity: int,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """A state that holds the prompts, ready to decode, and the logits of each prompt's next token.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      tokens: prompts, padded on the right with any token ids.
      lengths: tokens of each prompt, 1..T.
      capacity: tokens per sequence that the cache must hold, prompt and generated; static.

    Raises:
      ValueError: the prompts do not fit the capacity, or the capacity not the model's positions.
    """
    if tokens.shape[1] > capacity:
        raise ValueError(
            f"prompts of up to {tokens.shape[1]} tokens do not fit a capacity of {capacity}; raise it"
        )
    return extend(
        params, model, config, init_state(model, config, tokens.shape[0], capacity), tokens, lengths
    )


def extend(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Append given tokens, with full attention over all that is in the cache: a prompt, or a next turn.

    Empties the window of every sequence that gets tokens: what was decoded before them stays as it is.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: donate it, so that the cache is updated in place.
      tokens: padded on the right with any token ids.
      lengths: how many of them to append, 0..T; 0 changes nothing in that sequence. The cache must have
        room for them.

    Returns:
      The new state and float32 logits of the token after the last one; zeros where the length is 0.
    """
    B, T = tokens.shape
    chunk = min(config.prefill_chunk, T)
    chunks = -(-T // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - T)))

    def add_chunk(carry, inputs):
        state, logits = carry
        index, chunk_tokens = inputs
        state, fresh = _extend_chunk(
            params, model, config, state, chunk_tokens, jnp.clip(lengths - index * chunk, 0, chunk)
        )
        return (state, jnp.where((lengths > index * chunk)[:, None], fresh, logits)), None

    carry = state, jnp.zeros((B, model.vocab_size), jnp.float32)
    chunked = tokens.reshape(B, chunks, chunk).swapaxes(0, 1)
    (state, logits), _ = lax.scan(add_chunk, carry, (jnp.arange(chunks), chunked))
    return state, logits


def _extend_chunk(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """`extend` for one chunk; the logits of a sequence of length 0 have no meaning."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    x = transformer.embed(params, tokens)
    layers = []
    for layer, cache in zip(params.layers, state.layers, strict=True):
        # Chunks are matters of large matrix products, which XLA does well; the kernels are for single tokens.
        x, cache = dense_layer(layer, model, config, cache, x, state.length, valid, implementation="xla")
        layers.append(cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    state = state.replace(
        length=state.length + lengths,
        decoded=jnp.where(lengths > 0, 0, state.decoded),
        layers=tuple(layers),
    )
    return state, transformer.logits(params, model, jnp.take_along_axis(x, last, axis=1))[:, 0]
