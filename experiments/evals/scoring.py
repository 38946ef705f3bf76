"""How likely given continuations of given contexts are: by decode steps, or by a dense pass.

Contexts are read once however many continuations they have, and what many contexts begin with, such as the
same examples, is read once for all of them. Each continuation goes on from a copy of its context's state.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retro_jax import DecodeConfig, DecodeState, Model, NonFiniteLogits
from retro_jax.beginnings import LEAST, common_tokens
from retro_jax.decode import negative_log_likelihood, teacher_force
from retro_jax.dense import dense_hidden
from retro_jax.experiments.machine.memory import check_memory
from retro_jax.models import ModelConfig, transformer
from retro_jax.models.transformer import Params
from retro_jax.prompts import run_prefill
from retro_jax.sharding import new_state, to_host, under_mesh_of_weights
from retro_jax.sizes import MIN_CHUNK, MIN_STEPS, batch_rows, cache_capacity, program_length
from retro_jax.slots import take

MODES = ("decode", "prefill")
MOST_STEPS = 64
"""Decode steps of one compiled call."""
LOGITS_BLOCK = 16
"""Tokens of each sequence whose logits a dense pass holds at once."""

_take = jax.jit(take)


@dataclass(frozen=True)
class Pair:
    """A request.

    Attributes:
      context: token ids, at least one.
      continuation: token ids that follow, at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many the cache must hold: the last one is never read."""
        return len(self.context) + len(self.continuation) - 1


@dataclass(frozen=True)
class Likelihood:
    """What was found of a request.

    Attributes:
      index: its place among the requests.
      logprob: natural logarithm of the continuation's probability, given the context.
      greedy: whether each of its tokens was the most likely one.
    """

    index: int
    logprob: float
    greedy: bool


def likelihoods(
    model: Model, config: DecodeConfig, pairs: Sequence[Pair], mode: str, batch_size: int
) -> Iterator[Likelihood]:
    """Finds how likely continuations are, in the order in which that is cheapest.

    Args:
      model: from `load_model`.
      config: how to decode.
      pairs: the requests.
      mode: "decode": from the last token of the context on, each token is one decode step, so that the method
        decides about every token that is scored; what comes before is read densely, as a prompt is.
        "prefill": everything is read by dense passes, in which no method has a say.
      batch_size: at least 1; contexts that are read together, and continuations that are scored together.

    Raises:
      ValueError: a context or a continuation is empty, there are more tokens than the model has positions,
        or the batch does not fit the memory.
      NonFiniteLogits: a logit was NaN or infinite.
    """
    if not pairs:
        return
    for index, pair in enumerate(pairs):
        if not pair.context or not pair.continuation:
            empty = "continuation" if pair.context else "context"
            raise ValueError(f"the {empty} of request {index} has no tokens; give at least one")
    longest, positions = max(pair.tokens for pair in pairs), model.config.max_positions
    if longest > positions:
        raise ValueError(
            f"context and continuation take {longest} positions, {model.config.name} has {positions}; "
            "shorten the context"
        )
    members: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(pair.context, []).append(index)
    size = min(batch_size, len(pairs))
    # The states of what contexts begin with, of these, and of the continuations that go on from them.
    rows = batch_rows(1) + 2 * batch_rows(size)
    check_memory(model.config, [config], rows, cache_capacity(longest), loaded=True)
    for alike in groups(list(members), size):
        needed = max(pairs[index].tokens for context in alike for index in members[context])
        capacity = cache_capacity(needed, positions)
        shared = _shared([context[:-1] for context in alike])
        begun = _begin(model, config, shared, capacity) if len(shared) >= LEAST else None
        for start in range(0, len(alike), size):
            asked = [
                [(index, pairs[index]) for index in members[context]]
                for context in alike[start : start + size]
            ]
            yield from _score(model, config, begun, asked, mode, size, capacity)


def heads(contexts: Sequence[Sequence[int]], least: int) -> list[tuple[int, ...]]:
    """The first `LEAST` tokens of each context, or nothing where fewer than `least` contexts have them."""
    found = [tuple(context[:LEAST]) for context in contexts]
    counts = Counter(found)
    return [head if counts[head] >= least else () for head in found]


def groups(contexts: Sequence[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts that begin alike, where they fill a batch; of the others each batch. The longest are first."""
    ordered = sorted(
        zip(heads(contexts, size), contexts, strict=True), key=lambda pair: (pair[0], -len(pair[1]))
    )
    for head, pairs in groupby(ordered, lambda pair: pair[0]):
        alike = [context for _, context in pairs]
        length = len(alike) if head else size
        for start in range(0, len(alike), length):
            yield alike[start : start + length]


class Begun(NamedTuple):
    """What several contexts begin with: how many tokens, and the state of one sequence that has read them."""

    tokens: int
    state: DecodeState


@under_mesh_of_weights
def _begin(model: Model, config: DecodeConfig, shared: tuple[int, ...], capacity: int) -> Begun:
    state = new_state(model.config, config, batch_rows(1), capacity)
    state, _ = run_prefill(model, config, state, [np.array(shared)])
    return Begun(len(shared), state)


@under_mesh_of_weights
def _score(
    model: Model,
    config: DecodeConfig,
    begun: Begun | None,
    asked: Sequence[Sequence[tuple[int, Pair]]],
    mode: str,
    size: int,
    capacity: int,
) -> list[Likelihood]:
    """The likelihoods of the continuations of some contexts, a list for each."""
    rows = batch_rows(size)
    if begun is None:
        contexts = new_state(model.config, config, rows, capacity)
    else:
        contexts = _take(begun.state, np.zeros(rows, np.int32))
    rest = [requests[0][1].context[begun.tokens if begun else 0 : -1] for requests in asked]
    contexts, _ = run_prefill(model, config, contexts, [np.array(tokens, int) for tokens in rest])
    waiting = [(row, *request) for row, requests in enumerate(asked) for request in requests]
    waiting.sort(key=lambda request: len(request[2].continuation))
    found = []
    for start in range(0, len(waiting), size):
        found += _continue(model, config, contexts, waiting[start : start + size], mode, size)
    return found


def _shared(heads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of several contexts begin with; nothing of a single one."""
    first, last = min(heads), max(heads)
    if len(heads) == 1:
        return ()
    return first[: common_tokens(np.array(first, int), np.array(last, int))]


def _continue(
    model: Model,
    config: DecodeConfig,
    contexts: DecodeState,
    waiting: Sequence[tuple[int, int, Pair]],
    mode: str,
    size: int,
) -> list[Likelihood]:
    """The likelihoods of continuations, each told by the row of its context, its index and its request."""
    rows = np.zeros(batch_rows(size), np.int32)
    rows[: len(waiting)] = [row for row, _, _ in waiting]
    state = _take(contexts, rows)
    most = max(len(pair.continuation) for _, _, pair in waiting)
    least, largest = (MIN_STEPS, MOST_STEPS) if mode == "decode" else (MIN_CHUNK, config.prefill_chunk)
    steps = program_length(most, 1 if most == 1 else least, largest)
    shape = len(rows), -(-most // steps) * steps
    tokens, targets, active = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (_, _, pair) in enumerate(waiting):
        count = len(pair.continuation)
        tokens[row, :count] = pair.context[-1:] + pair.continuation[:-1]
        targets[row, :count], active[row, :count] = pair.continuation, True
    parts = []
    for begin in range(0, shape[1], steps):
        part = slice(begin, begin + steps)
        state, found = _FORCE[mode](
            model.params, model.config, config, state, tokens[:, part], targets[:, part], active[:, part]
        )
        parts.append(to_host(found))
    nll, hits, finite = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    results = []
    for row, (_, index, pair) in enumerate(waiting):
        count = len(pair.continuation)
        if not finite[row, :count].all():
            step = int(np.argmin(finite[row, :count]))
            raise NonFiniteLogits(
                f"the logits of request {index} are not finite at token {step} of its continuation", results
            )
        logprob = -float(nll[row, :count].astype(np.float64).sum())
        results.append(Likelihood(index, logprob, bool(hits[row, :count].all())))
    return results


def _decode(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    active: Bool[Array, "B T"],
) -> tuple[DecodeState, tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]]:
    """By decode steps: how unlikely each target was, whether it was greedy, and all logits finite."""
    state, forced = teacher_force(params, model, config, state, tokens, targets, active)
    return state, (forced.nll, forced.hits, forced.finite)


def _dense(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    active: Bool[Array, "B T"],
) -> tuple[DecodeState, tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]]:
    """By one dense pass: the same."""
    state, hidden = dense_hidden(params, model, config, state, tokens, active.sum(axis=1), "xla")

    def block(inputs):
        h, wanted = inputs
        logits = transformer.head(params, model, h)
        flat = logits.reshape(-1, logits.shape[-1])
        nll = negative_log_likelihood(flat, wanted.reshape(-1)).reshape(wanted.shape)
        return nll, jnp.argmax(logits, axis=-1) == wanted, jnp.isfinite(logits).all(axis=-1)

    B, T = tokens.shape
    length = min(LOGITS_BLOCK, T)
    padded = -(-T // length) * length - T

    def blocks(array):
        array = jnp.pad(array, ((0, 0), (0, padded)) + ((0, 0),) * (array.ndim - 2))
        return array.reshape(B, -1, length, *array.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(block, (blocks(hidden), blocks(targets)))
    nll, hits, finite = (each.swapaxes(0, 1).reshape(B, -1)[:, :T] for each in found)
    return state, (jnp.where(active, nll, 0.0), hits & active, finite | ~active)


_FORCE = {
    mode: jax.jit(function, static_argnames=("model", "config"), donate_argnames="state")
    for mode, function in (("decode", _decode), ("prefill", _dense))
}
