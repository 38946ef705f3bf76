"""Teacher-forced log-likelihoods of given text, through the same steps that generate."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from models import Model
from retro_jax.config import DecodeConfig
from retro_jax.decode import negative_log_likelihood, teacher_force
from retro_jax.generate import Progress, run_prefill
from retro_jax.inputs import NonFiniteLogits, check_capacity, check_token_ids
from retro_jax.metrics import Metrics
from retro_jax.sharding import beside_weights, under_mesh_of_weights
from retro_jax.state import init_state

_teacher_force = jax.jit(teacher_force, static_argnames=("model", "config"), donate_argnames="state")


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Attributes:
      nll: [B, T - prompt_tokens] float64, negative log-likelihood (natural log) of token prompt_tokens + i
        given all tokens before it. The first one comes from the prefill, with full attention.
      metrics: of the decode steps; None if there was none.
    """

    nll: np.ndarray
    metrics: Metrics | None


@under_mesh_of_weights
def score(
    model: Model,
    token_ids: np.ndarray,
    config: DecodeConfig,
    prompt_tokens: int,
    *,
    capacity: int | None = None,
    progress: Progress | None = None,
    steps_per_call: int = 64,
) -> Score:
    """How likely the model finds a text when it decodes along it: prompt densely, then step by step.

    Args:
      model: from `load_model`.
      token_ids: [T], or [B, T] for a batch of texts of equal length.
      config: how to decode.
      prompt_tokens: tokens at the beginning that are prefilled and not scored, 1..T-1.
      capacity: tokens per sequence that the cache holds; None: just enough.
      progress: called as tokens are done.
      steps_per_call: decode steps of one compiled call.

    Raises:
      ValueError: token ids out of the vocabulary or of another shape, a prompt that leaves nothing to
        score, or a text that does not fit the capacity or the model's positions.
      TypeError: token ids are not whole numbers.
      NonFiniteLogits: a logit was NaN or infinite; its `partial` is the Score up to there.
    """
    ids = np.atleast_2d(check_token_ids(model.config, token_ids, "token_ids"))
    if ids.ndim != 2:
        raise ValueError(f"token_ids has shape {np.shape(token_ids)}; give [T] or [B, T]")
    batch, total = ids.shape
    if not 1 <= prompt_tokens < total:
        raise ValueError(f"prompt_tokens {prompt_tokens} is not within 1..{total - 1} for {total} tokens")
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call {steps_per_call} must be at least 1")
    capacity = check_capacity(model.config, total, capacity)

    state = beside_weights(init_state(model.config, config, batch, capacity), model.params, model.config)
    state, logits = run_prefill(model, config, state, list(ids[:, :prompt_tokens]), progress)
    nll = [np.asarray(negative_log_likelihood(logits, jnp.asarray(ids[:, prompt_tokens])))[:, None]]
    calls = []

    def result() -> Score:
        joined = np.concatenate(nll, axis=1).astype(np.float64)
        return Score(joined, Metrics.gather(calls) if calls else None)

    if not np.isfinite(np.asarray(logits)).all():
        raise NonFiniteLogits("the logits after the prompt are not finite", result())
    steps = total - 1 - prompt_tokens
    for begin in range(0, steps, steps_per_call):
        count = min(steps_per_call, steps - begin)
        window = np.zeros((batch, steps_per_call + 1), np.int32)
        window[:, : count + 1] = ids[:, prompt_tokens + begin : prompt_tokens + begin + count + 1]
        active = np.broadcast_to(np.arange(steps_per_call) < count, (batch, steps_per_call))
        state, forced = _teacher_force(
            model.params, model.config, config, state, window[:, :-1], window[:, 1:], active
        )
        finite = np.asarray(forced.finite)[:, :count]
        if not finite.all():
            sequence, step = np.argwhere(~finite)[0]
            raise NonFiniteLogits(
                f"the logits of sequence {sequence} are not finite after token "
                f"{prompt_tokens + begin + step}",
                result(),
            )
        nll.append(np.asarray(forced.nll)[:, :count])
        calls.append(forced.metrics)
        if progress:
            progress("decode", begin + count, steps)
    return result()
