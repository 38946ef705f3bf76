"""Prompt tokens into the state, with full attention, chunk by chunk."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.transformer import Params
from retro_jax.config import DecodeConfig
from retro_jax.dense import dense_pass
from retro_jax.rectify import rewrite
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

    Empties the window of every sequence that gets tokens: what was decoded before them stays as it is, or is
    rectified first where `config.rectify_every` asks for it.

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
    if config.rectify_every:
        state = rewrite(params, model, config, state, lengths > 0)
    chunk = min(config.prefill_chunk, T)
    chunks = -(-T // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - T)))

    def add_chunk(carry, inputs):
        state, logits = carry
        index, chunk_tokens = inputs
        state, fresh = dense_pass(
            params, model, config, state, chunk_tokens, jnp.clip(lengths - index * chunk, 0, chunk)
        )
        return (state, jnp.where((lengths > index * chunk)[:, None], fresh, logits)), None

    carry = state, jnp.zeros((B, model.vocab_size), jnp.float32)
    chunked = tokens.reshape(B, chunks, chunk).swapaxes(0, 1)
    (state, logits), _ = lax.scan(add_chunk, carry, (jnp.arange(chunks), chunked))
    return state, logits
