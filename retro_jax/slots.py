"""Sequences that come and go in a batch of fixed slots: the pure functions under `generate_many`.

The prompts of newcomers are read into a small state of their own, beside the one that decodes; a newcomer
that is whole takes a free slot, with all that its state holds. So nothing is left there of who came before.
What newcomers begin with in common is read into the state of one sequence, of which each takes a copy.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels.settings import under_fixed_settings
from retro_jax.config import DecodeConfig
from retro_jax.decode import negative_log_likelihood
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.prefill import extend
from retro_jax.sampling import Sampling, sample
from retro_jax.state import DecodeState, reset


@flax.struct.dataclass
class FirstTokens:
    """What `read` chose for each newcomer; of meaning where these were its prompt's last tokens.

    Attributes:
      tokens: the tokens that follow, not in the cache yet.
      logprobs: as in `Decoded`.
      finite: whether all logits were finite.
    """

    tokens: Int[Array, " R"]
    logprobs: Float[Array, " R"]
    finite: Bool[Array, " R"]


@under_fixed_settings
def read(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "R T"],
    lengths: Int[Array, " R"],
    begin: Bool[Array, " R"],
    sampling: Sampling,
    keys: Key[Array, " R"],
) -> tuple[DecodeState, FirstTokens]:
    """Reads the next tokens of newcomers' prompts, with full attention, and chooses what follows them.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: of R newcomers. Donate it.
      tokens: padded on the right with any token ids.
      lengths: how many of them to read, 0..T; 0 changes nothing of that newcomer.
      begin: where a new prompt begins, in place of what the state held.
      sampling: how tokens are chosen; static.
      keys: one random key per newcomer.
    """
    state = reset(model, config, state, begin)
    state, logits = extend(params, model, config, state, tokens, lengths)
    chosen = sample(logits, sampling, keys, state.length)
    first = FirstTokens(
        tokens=chosen,
        logprobs=-negative_log_likelihood(logits, chosen),
        finite=jnp.all(jnp.isfinite(logits), axis=-1),
    )
    return state, first


@under_fixed_settings
def insert(state: DecodeState, newcomers: DecodeState, slots: Int[Array, " R"]) -> DecodeState:
    """Puts newcomers into slots, in place of all that those held.

    Args:
      state: of B slots. Donate it, so that it is updated in place.
      newcomers: of R, for caches of the same capacity.
      slots: of each newcomer, none of them twice; B, which is no slot, leaves it out.
    """
    return jax.tree.map(lambda kept, new: kept.at[slots].set(new, mode="drop"), state, newcomers)


def take(state: DecodeState, rows: Int[Array, " R"]) -> DecodeState:
    """Some sequences of a state, as often as they are named."""
    return jax.tree.map(lambda array: array[rows], state)
