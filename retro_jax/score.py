"""Teacher-forced log-likelihoods of given text, through the same steps that generate."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.budget import Budget, largest
from retro_jax.compilation import JitForMesh
from retro_jax.config import DecodeConfig
from retro_jax.decode import negative_log_likelihood, teacher_force
from retro_jax.inputs import NonFiniteLogits, check_capacity, check_token_ids, check_whole
from retro_jax.metrics import Metrics
from retro_jax.models import Model
from retro_jax.prompts import Progress, run_prefill
from retro_jax.sharding import check_processes_agree, new_state, to_host, under_mesh_of_weights
from retro_jax.sizes import MIN_STEPS, batch_rows, program_length

_teacher_force = JitForMesh(teacher_force, static_argnames=("model", "config"), donate_argnames="state")

TokenIds = np.ndarray | Sequence[int] | Sequence[np.ndarray] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """The result of `score`; E is the largest number of scored tokens of a text.

    Attributes:
      nll: [B, E] float64, negative log-likelihood (natural log) of token prompt_tokens + i given all tokens
        before it; NaN beyond the end of a shorter text. The first one comes from the prefill, with full
        attention.
      hits: [B, E], whether that token was the most likely one; False beyond the end.
      metrics: of the decode steps; None if there was none.
    """

    nll: np.ndarray
    hits: np.ndarray
    metrics: Metrics | None

    def of(self, texts: slice) -> "Score":
        """The result of some of the texts."""
        return Score(self.nll[texts], self.hits[texts], self.metrics and self.metrics.of(texts))


@under_mesh_of_weights
def score(
    model: Model,
    token_ids: TokenIds,
    config: DecodeConfig | Sequence[DecodeConfig],
    prompt_tokens: int | Sequence[int],
    *,
    capacity: int | None = None,
    progress: Progress | None = None,
    steps_per_call: int = 64,
) -> Score:
    """How likely the model finds a text when it decodes along it: prompt densely, then step by step.

    Runs on the devices that the weights lie on (see `sharding`).

    Args:
      model: from `load_model`.
      token_ids: [T], [B, T] for a batch of texts of equal length, or a list of [T] of any lengths.
      config: how to decode; or one for each text, which may differ in their budgets only.
      prompt_tokens: tokens at the beginning that are prefilled and not scored, 1..T-1; one number for all
        texts or one for each.
      capacity: tokens per sequence that the cache holds; None: enough.
      progress: called as tokens are done.
      steps_per_call: decode steps of one compiled call, at most; fewer where the texts need no more.

    Raises:
      ValueError: token ids out of the vocabulary or of another shape, a prompt that leaves nothing to
        score, a text that does not fit the capacity or the model's positions, configurations that are not one
        for each text or differ in more than their budgets, or processes of a mesh that disagree.
      TypeError: token ids or numbers are not whole.
      NonFiniteLogits: a logit was NaN or infinite; its `partial` is the Score up to there.
    """
    check_processes_agree(
        token_ids=token_ids,
        config=config,
        prompt_tokens=prompt_tokens,
        limits=(capacity, steps_per_call),
    )
    rows, prompts = _rows(model, token_ids, prompt_tokens)
    check_whole(steps_per_call=steps_per_call)
    batch, lengths = len(rows), np.array([len(row) for row in rows])
    capacity = check_capacity(model.config, int(lengths.max()), capacity)

    configs = [config] * batch if isinstance(config, DecodeConfig) else list(config)
    if len(configs) != batch:
        raise ValueError(f"{len(configs)} configurations were given for {batch} texts; give one for each")
    itemsize = jnp.dtype(model.config.dtype).itemsize
    config = largest(configs, configs[0].num_pages(capacity), model.config.head_dim, itemsize)
    padded = batch_rows(batch)
    state = new_state(model.config, config, padded, capacity)
    shardings = jax.tree.map(lambda array: array.sharding, state.budget)
    budgets = Budget.of_each(configs + configs[-1:] * (padded - batch))
    state = state.replace(budget=jax.device_put(budgets, shardings))
    heads = [row[:count] for row, count in zip(rows, prompts, strict=True)]
    state, logits = run_prefill(model, config, state, heads, progress)
    logits = logits[:batch]
    firsts = jnp.array([row[count] for row, count in zip(rows, prompts, strict=True)])
    likely, all_finite = jnp.argmax(logits, axis=-1) == firsts, jnp.isfinite(logits).all()
    first_nll, first_hits, finite = to_host((negative_log_likelihood(logits, firsts), likely, all_finite))
    nll, hits = [first_nll[:, None]], [first_hits[:, None]]
    calls = []
    scored = lengths - prompts

    def result() -> Score:
        joined = np.concatenate(nll, axis=1).astype(np.float64)
        inside = np.arange(joined.shape[1]) < scored[:, None]
        metrics = Metrics.gather(calls).of(slice(batch)) if calls else None
        return Score(np.where(inside, joined, np.nan), np.concatenate(hits, axis=1) & inside, metrics)

    if not finite:
        raise NonFiniteLogits("the logits after the prompt are not finite", result())
    steps = int(scored.max()) - 1
    steps_per_call = program_length(max(steps, 1), MIN_STEPS, steps_per_call)
    for begin in range(0, steps, steps_per_call):
        count = min(steps_per_call, steps - begin)
        forcing = _forcing(rows, prompts + begin, count, (padded, steps_per_call))
        state, forced = _teacher_force(model.params, model.config, config, state, *forcing)
        calls_nll, calls_hits, finite = (
            array[:batch, :count] for array in to_host((forced.nll, forced.hits, forced.finite))
        )
        if not finite.all():
            sequence, step = np.argwhere(~finite)[0]
            raise NonFiniteLogits(
                f"the logits of sequence {sequence} are not finite after token "
                f"{prompts[sequence] + begin + step}",
                result(),
            )
        nll.append(calls_nll)
        hits.append(calls_hits)
        calls.append(forced.metrics)
        if progress:
            progress("decode", begin + count, steps)
    return result()


def _forcing(
    rows: Sequence[np.ndarray], starts: np.ndarray, count: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `teacher_force` is told in arrays of a shape [rows, steps]: tokens, targets, and which are active.

    Args:
      rows: token ids of each text; rows beyond them are never active.
      starts: of each text, the position that the first step processes.
      count: steps that are taken; a text takes part while it has another token to score.
      shape: at least one row for each text, and `count` steps.
    """
    tokens, targets, active = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        steps = np.clip(len(row) - 1 - start, 0, count)
        tokens[index, :steps] = row[start : start + steps]
        targets[index, :steps] = row[start + 1 : start + 1 + steps]
        active[index, :steps] = True
    return tokens, targets, active


def _rows(
    model: Model, token_ids: TokenIds, prompt_tokens: int | Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The texts as rows of checked ids, and the number of prompt tokens of each."""
    if isinstance(token_ids, list) and len({np.shape(row) for row in token_ids}) > 1:
        rows = [check_token_ids(model.config, row, f"text {index}") for index, row in enumerate(token_ids)]
    else:
        rows = list(np.atleast_2d(check_token_ids(model.config, token_ids, "token_ids")))
    if any(row.ndim != 1 for row in rows):
        raise ValueError(
            f"token_ids has shape {np.shape(token_ids)}; give [T], [B, T] or a list of [T] of any lengths"
        )
    given = np.atleast_1d(np.asarray(prompt_tokens))
    if not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"prompt_tokens is {prompt_tokens!r}; give a whole number, or one for each text")
    if np.ndim(prompt_tokens) and given.shape != (len(rows),):
        raise ValueError(f"prompt_tokens has {given.size} numbers for {len(rows)} texts; give one for each")
    prompts = np.broadcast_to(given, (len(rows),))
    for row, count in zip(rows, prompts, strict=True):
        if not 1 <= count < len(row):
            raise ValueError(f"prompt_tokens {count} is not within 1..{len(row) - 1} for {len(row)} tokens")
    return rows, prompts
