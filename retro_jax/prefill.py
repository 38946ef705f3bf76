"""Prompt tokens into the state, with full attention, chunk by chunk."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.settings import under_fixed_settings
from retro_jax.config import DecodeConfig
from retro_jax.dense import dense_pass
from retro_jax.inputs import check_ids, check_ints, check_lengths
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.rectify import rewrite
from retro_jax.state import DecodeState, init_state


@under_fixed_settings
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
      tokens: prompts, padded on the right with any token ids. Within a trace nothing tells that one is
        outside the vocabulary.
      lengths: tokens of each prompt, 1..T.
      capacity: tokens per sequence that the cache must hold, prompt and generated; static.

    Returns:
      The state and float32 logits; NaN for a length that is not within 1..T, which adds nothing.

    Raises:
      ValueError: the prompts do not fit the capacity, or the capacity not the model's positions; tokens are
        not [B, T], lengths not one for each, or (outside of a trace) not within 1..T, or an id is outside the
        vocabulary.
      TypeError: tokens or lengths are not whole numbers.
    """
    B, T = _check_tokens(tokens)
    if capacity < T:
        raise ValueError(f"prompts of up to {T} tokens do not fit a capacity of {capacity}; raise it")
    state = init_state(model, config, B, capacity)
    lengths = check_ints(lengths, (B,), "lengths", "one for each row of tokens")
    check_lengths(lengths, 1, T, state.room(model))
    state, logits = extend(params, model, config, state, tokens, lengths)
    return state, jnp.where((lengths < 1)[:, None], jnp.nan, logits)


@under_fixed_settings
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
      lengths: how many of them to append, 0..T; 0 changes nothing in that sequence.

    Returns:
      The new state and float32 logits of the token after the last one; zeros where the length is 0. A
      sequence that has no room for its tokens (`state.room`), or whose length is not within 0..T, keeps its
      state, and its logits are NaN.

    Raises:
      ValueError: tokens are not [B, T] with the B of the state, or lengths not one for each, or the state was
        made with another configuration or model; outside of a trace, also for a length out of its range or
        without room, or an id outside the vocabulary.
      TypeError: tokens or lengths are not whole numbers.
    """
    B, T = _check_tokens(tokens)
    tokens = check_ints(tokens, (state.length.shape[0], T), "tokens", "a row for each sequence of the state")
    lengths = check_ints(lengths, (B,), "lengths", "one for each row of tokens")
    state.check_made_by(model, config)
    room = state.room(model)
    check_lengths(lengths, 0, T, room)
    check_ids(tokens, jnp.arange(T) < lengths[:, None], model)
    fits = (lengths >= 0) & (lengths <= jnp.minimum(T, room))
    lengths = jnp.where(fits, lengths, 0)
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
    return state, jnp.where(fits[:, None], logits, jnp.nan)


def _check_tokens(tokens: Array) -> tuple[int, int]:
    """B and T; raises ValueError if the tokens have no such axes."""
    shape = jnp.shape(tokens)
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"tokens has shape {shape}; give [B, T], at least one token for each sequence")
    return shape
