"""Rectification: every f decoded tokens, one dense pass writes their keys and values anew, exactly.

From Rectified Sparse Attention (ReSA, arXiv 2506.04108). Behind the last rectified token the cache is that
of full attention, so the errors of sparse attention reach back f tokens at most. With f = 1 only the newest
query is ever sparse.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from retro_jax.config import DecodeConfig
from retro_jax.dense import dense_pass
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.state import DecodeState


def rectify(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Note the tokens that a step has decoded; rewrite those of every sequence that has `rectify_every`.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static. Its `rectify_every` is set.
      state: after the step.
      tokens: that the step decoded, at position `state.length - 1`.
      active: sequences that it decoded them for.

    Returns:
      The state, and which sequences were rewritten.
    """
    stale = state.stale
    place = active[:, None] & (jnp.arange(config.rectify_every) == stale.count[:, None])
    stale = stale.replace(tokens=jnp.where(place, tokens[:, None], stale.tokens), count=stale.count + active)
    due = stale.count == config.rectify_every
    return rewrite(params, model, config, state.replace(stale=stale), due), due


def rewrite(
    params: Params, model: ModelConfig, config: DecodeConfig, state: DecodeState, due: Bool[Array, " B"]
) -> DecodeState:
    """The state with exact keys and values of all stale tokens of the sequences that are due.

    The pass is that of a prompt, over tokens that are there already. Nothing in the window of such a sequence
    is left to revise: it is emptied.
    """
    stale = state.stale
    lengths = jnp.where(due, stale.count, 0)

    def dense(state: DecodeState) -> DecodeState:
        behind = state.replace(length=state.length - lengths)
        return dense_pass(params, model, config, behind, stale.tokens, lengths)[0]

    # A loop of one round or none and no `cond`, through which XLA would copy a layer of the cache.
    state = lax.cond(jnp.any(lengths > 0), dense, lambda state: state, state)
    return state.replace(stale=stale.replace(count=stale.count - lengths))
