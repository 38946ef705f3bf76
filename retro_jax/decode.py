"""Many decode steps under one `lax.scan`: free-running, or forced along given tokens."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from models.config import ModelConfig
from models.transformer import Params
from retro_jax.config import DecodeConfig
from retro_jax.sampling import Sampling, sample, sequence_keys
from retro_jax.state import DecodeState, StepMetrics
from retro_jax.step import decode_step


@flax.struct.dataclass
class Decoded:
    """What `decode` produced.

    Attributes:
      tokens: the token chosen at each step; without meaning where `emitted` is False.
      emitted: steps in which the sequence was active.
      finite: whether all logits of the step were finite.
      pending: the last token of each sequence, chosen but not yet in the cache.
      remaining: tokens that each sequence may still emit; 0 once it has ended.
      metrics: of every step, stacked in front.
    """

    tokens: Int[Array, "B steps"]
    emitted: Bool[Array, "B steps"]
    finite: Bool[Array, "B steps"]
    pending: Int[Array, " B"]
    remaining: Int[Array, " B"]
    metrics: StepMetrics


def decode(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    first_tokens: Int[Array, " B"],
    steps: int,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    stop_tokens: Int[Array, " stops"] | None = None,
    remaining: Int[Array, " B"] | None = None,
) -> tuple[DecodeState, Decoded]:
    """Generate `steps` tokens per sequence. n calls of one step give what one call of n steps gives.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: donate it. The cache must have room for the steps.
      first_tokens: the tokens to start from: chosen, but not in the cache yet.
      steps: of the scan; static.
      sampling: how tokens are chosen; static. None: greedy.
      keys: one random key per sequence; None: from `sampling.seed`.
      stop_tokens: a sequence that chooses one of these has ended.
      remaining: tokens that each sequence may still emit; it ends at 0. None: no limit.
    """
    B = first_tokens.shape[0]
    sampling = sampling or Sampling()
    keys = sequence_keys(sampling, B) if keys is None else keys
    stop_tokens = jnp.zeros(0, jnp.int32) if stop_tokens is None else stop_tokens
    remaining = jnp.full(B, jnp.iinfo(jnp.int32).max) if remaining is None else remaining

    def step(carry, _):
        state, tokens, remaining = carry
        active = remaining > 0
        state, logits = decode_step(params, model, config, state, tokens, active)
        chosen = sample(logits, sampling, keys, state.length)
        tokens = jnp.where(active, chosen, tokens)
        stopped = jnp.any(tokens[:, None] == stop_tokens, axis=1)
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | ~active
        return (state, tokens, remaining), (tokens, active, finite, state.metrics)

    carry = state, first_tokens, remaining
    (state, pending, remaining), outputs = lax.scan(step, carry, length=steps)
    tokens, emitted, finite = (array.swapaxes(0, 1) for array in outputs[:3])
    return state, Decoded(tokens, emitted, finite, pending, remaining, metrics=outputs[3])


@flax.struct.dataclass
class Forced:
    """What `teacher_force` measured.

    Attributes:
      nll: negative log-likelihood, natural log, of each step's target; 0 where not active.
      hits: whether the target was the most likely token; False where not active.
      finite: whether all logits of the step were finite.
      metrics: of every step, stacked in front.
    """

    nll: Float[Array, "B T"]
    hits: Bool[Array, "B T"]
    finite: Bool[Array, "B T"]
    metrics: StepMetrics


def teacher_force(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    active: Bool[Array, "B T"],
) -> tuple[DecodeState, Forced]:
    """Decode along given tokens and measure how likely each target was, by the same steps as `decode`.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: donate it. The cache must have room for the tokens.
      tokens: the newest token of each step.
      targets: the token that follows each of them.
      active: steps to take; the others change nothing.
    """

    def step(state, inputs):
        tokens, targets, active = inputs
        state, logits = decode_step(params, model, config, state, tokens, active)
        nll = negative_log_likelihood(logits, targets)
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | ~active
        hits = active & (jnp.argmax(logits, axis=-1) == targets)
        return state, (jnp.where(active, nll, 0.0), hits, finite, state.metrics)

    inputs = tuple(array.swapaxes(0, 1) for array in (tokens, targets, active))
    state, outputs = lax.scan(step, state, inputs)
    nll, hits, finite = (array.swapaxes(0, 1) for array in outputs[:3])
    return state, Forced(nll, hits, finite, metrics=outputs[3])


def negative_log_likelihood(logits: Float[Array, "B V"], targets: Int[Array, " B"]) -> Float[Array, " B"]:
    """Natural log, float32."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
