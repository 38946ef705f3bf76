"""Many decode steps under one `lax.scan`: free-running, or forced along given tokens."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels.settings import under_fixed_settings
from retro_jax.cache import StepMetrics
from retro_jax.config import DecodeConfig
from retro_jax.inputs import check_bools, check_ints, check_keys
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.sampling import Sampling, sample, sequence_keys
from retro_jax.state import DecodeState
from retro_jax.step import decode_step


@flax.struct.dataclass
class Decoded:
    """What `decode` produced.

    Attributes:
      tokens: the token chosen at each step; without meaning where `emitted` is False.
      emitted: steps in which the sequence was active.
      logprobs: natural logarithm of each token's probability in the model's whole distribution, at
        temperature 1 whatever the sampling.
      finite: whether all logits of the step were finite.
      pending: the last token of each sequence, chosen but not yet in the cache.
      remaining: tokens that each sequence may still emit; 0 once it has ended, by a stop token or for want
        of room in the cache.
      metrics: of every step, stacked in front.
    """

    tokens: Int[Array, "B steps"]
    emitted: Bool[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    finite: Bool[Array, "B steps"]
    pending: Int[Array, " B"]
    remaining: Int[Array, " B"]
    metrics: StepMetrics


@under_fixed_settings
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
      state: donate it. A sequence that has no room left (`state.room`) ends.
      first_tokens: the tokens to start from: chosen, but not in the cache yet.
      steps: of the scan; static.
      sampling: how tokens are chosen; static. None: greedy.
      keys: one random key per sequence; None: from `sampling.seed`.
      stop_tokens: a sequence that chooses one of these has ended.
      remaining: tokens that each sequence may still emit; it ends at 0. None: no limit.

    Raises:
      ValueError: first_tokens, keys or remaining are not one for each sequence of the state, or stop_tokens
        are no list.
      TypeError: token ids are not whole numbers, or keys are not those of `jax.random.key`.
    """
    (B,), each = state.length.shape, "one for each sequence of the state"
    first_tokens = check_ints(first_tokens, (B,), "first_tokens", each)
    sampling = sampling or Sampling()
    keys = sequence_keys(sampling, B) if keys is None else check_keys(keys, B)
    stop_tokens = jnp.zeros(0, jnp.int32) if stop_tokens is None else stop_tokens
    stop_tokens = check_ints(stop_tokens, (jnp.size(stop_tokens),), "stop_tokens", "a list")
    remaining = jnp.full(B, jnp.iinfo(jnp.int32).max) if remaining is None else remaining
    remaining = check_ints(remaining, (B,), "remaining", each)

    def step(carry, _):
        state, tokens, remaining = carry
        active = (remaining > 0) & (state.room(model) > 0)
        state, logits = decode_step(params, model, config, state, tokens, active)
        chosen = sample(logits, sampling, keys, state.length)
        tokens = jnp.where(active, chosen, tokens)
        stopped = jnp.any(tokens[:, None] == stop_tokens, axis=1)
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        finite = all_finite(logits) | ~active
        logprobs = -negative_log_likelihood(logits, tokens)
        return (state, tokens, remaining), (tokens, active, logprobs, finite, state.metrics)

    carry = state, first_tokens, remaining
    (state, pending, remaining), outputs = lax.scan(step, carry, length=steps)
    tokens, emitted, logprobs, finite = (array.swapaxes(0, 1) for array in outputs[:4])
    return state, Decoded(tokens, emitted, logprobs, finite, pending, remaining, metrics=outputs[4])


@flax.struct.dataclass
class Forced:
    """What `teacher_force` measured.

    Attributes:
      nll: negative log-likelihood, natural log, of each step's target; 0 where not active, NaN where the
        cache had no room for the token.
      hits: whether the target was the most likely token; False where not active or not finite.
      finite: whether all logits of the step were finite.
      metrics: of every step, stacked in front.
    """

    nll: Float[Array, "B T"]
    hits: Bool[Array, "B T"]
    finite: Bool[Array, "B T"]
    metrics: StepMetrics


@under_fixed_settings
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
      state: donate it.
      tokens: the newest token of each step.
      targets: the token that follows each of them.
      active: steps to take; the others change nothing.

    Raises:
      ValueError: the three are not of one shape, or not one row for each sequence of the state.
      TypeError: token ids are not whole numbers, or active is not made of truth values.
    """
    shape = state.length.shape[0], *jnp.shape(tokens)[1:2]
    tokens = check_ints(tokens, shape, "tokens", "a row for each sequence of the state")
    targets = check_ints(targets, shape, "targets", "one for each token")
    active = check_bools(active, shape, "active", "one for each token")

    def step(state, inputs):
        tokens, targets, active = inputs
        state, logits = decode_step(params, model, config, state, tokens, active)
        nll = negative_log_likelihood(logits, targets)
        finite = all_finite(logits) | ~active
        hits = active & finite & (jnp.argmax(logits, axis=-1) == targets)
        return state, (jnp.where(active, nll, 0.0), hits, finite, state.metrics)

    inputs = tuple(array.swapaxes(0, 1) for array in (tokens, targets, active))
    state, outputs = lax.scan(step, state, inputs)
    nll, hits, finite = (array.swapaxes(0, 1) for array in outputs[:3])
    return state, Forced(nll, hits, finite, metrics=outputs[3])


@under_fixed_settings
def negative_log_likelihood(logits: Float[Array, "B V"], targets: Int[Array, " B"]) -> Float[Array, " B"]:
    """Natural log, float32; NaN for a target that is no token."""
    # A sum, since several devices have a part of the logits each: looked up, all of them would be gathered.
    tokens = jnp.arange(logits.shape[1])
    chosen = jnp.sum(jnp.where(tokens == targets[:, None], logits, 0), axis=-1)
    known = (targets >= 0) & (targets < logits.shape[1])
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(known, chosen, jnp.nan)


def all_finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether all logits of a sequence are finite."""
    # Counted in the numbers that devices sum anyway, in one sum with what the log-likelihood needs.
    return jnp.sum(~jnp.isfinite(logits), axis=-1, dtype=jnp.float32) == 0
