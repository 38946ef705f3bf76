"""How likely given continuations of given contexts are: by decode steps, or by a dense pass.

Contexts are read once however many continuations they have, and what all contexts of a batch begin with is
read once for all of them. Then each continuation goes on from a copy of its context's state.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from retro_jax import DecodeConfig, DecodeState, Model, NonFiniteLogits
from retro_jax.decode import negative_log_likelihood, teacher_force
from retro_jax.dense import dense_hidden
from retro_jax.experiments.machine.memory import check_memory
from retro_jax.generate import run_prefill
from retro_jax.models import ModelConfig, transformer
from retro_jax.models.transformer import Params
from retro_jax.sharding import new_state, to_host, under_mesh_of_weights
from retro_jax.sizes import MIN_CHUNK, MIN_STEPS, batch_rows, cache_capacity, program_length

MODES = ("decode", "prefill")
HEAD = 64
"""Contexts that share so many first tokens are read together, if they fill a batch."""
MOST_STEPS = 64
"""Decode steps of one compiled call."""
LOGITS_BLOCK = 16
"""Tokens of each sequence whose logits a dense pass holds at once."""


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
      batch_size: contexts that are read together, and continuations that are scored together.

    Raises:
      ValueError: a context or a continuation is empty, there are more tokens than the model has positions,
        the mode is unknown, the batch is empty or does not fit the memory.
      NonFiniteLogits: a logit was NaN or infinite.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
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
    # The states of the contexts, and of the continuations that go on from them.
    check_memory(model.config, [config], 2 * batch_rows(size), cache_capacity(longest), loaded=True)
    for contexts in batches(list(members), size):
        asked = [[(index, pairs[index]) for index in members[context]] for context in contexts]
        yield from _score(model, config, asked, mode, size)


def batches(contexts: Sequence[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts that are read together: those that begin alike where they fill a batch, longest first."""
    heads = Counter(context[:HEAD] for context in contexts)

    def head(context: tuple[int, ...]) -> tuple[int, ...]:
        return context[:HEAD] if heads[context[:HEAD]] >= size else ()

    for _, group in groupby(sorted(contexts, key=lambda each: (head(each), -len(each))), head):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


@under_mesh_of_weights
def _score(
    model: Model, config: DecodeConfig, asked: Sequence[Sequence[tuple[int, Pair]]], mode: str, size: int
) -> list[Likelihood]:
    """The likelihoods of the continuations of some contexts, a list for each."""
    tokens = max(pair.tokens for requests in asked for _, pair in requests)
    capacity = cache_capacity(tokens, model.config.max_positions)
    contexts = _read(model, config, [requests[0][1].context[:-1] for requests in asked], size, capacity)
    waiting = [(row, *request) for row, requests in enumerate(asked) for request in requests]
    waiting.sort(key=lambda request: len(request[2].continuation))
    found = []
    for start in range(0, len(waiting), size):
        found += _continue(model, config, contexts, waiting[start : start + size], mode, size)
    return found


def _read(
    model: Model, config: DecodeConfig, heads: Sequence[tuple[int, ...]], size: int, capacity: int
) -> DecodeState:
    """The state after the contexts, what all of them begin with read once."""
    shared = _shared(heads)
    if len(shared) < HEAD:
        shared, state = (), new_state(model.config, config, batch_rows(size), capacity)
    else:
        state = new_state(model.config, config, batch_rows(1), capacity)
        state, _ = run_prefill(model, config, state, [np.array(shared)])
        state = _take(state, np.zeros(batch_rows(size), np.int32))
    state, _ = run_prefill(model, config, state, [np.array(head[len(shared) :], int) for head in heads])
    return state


def _shared(heads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of several contexts begin with; nothing of a single one."""
    first, last = min(heads), max(heads)
    if len(heads) == 1:
        return ()
    return first[
        : next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    ]


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


@jax.jit
def _take(state: DecodeState, rows: Int[Array, " R"]) -> DecodeState:
    """Some sequences of a state, as often as they are named."""
    return jax.tree.map(lambda array: array[rows], state)


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
        x, wanted = inputs
        logits = transformer.logits(params, model, x)
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
