"""Text in, text out: prefill, then jitted scans of decode steps, for a batch of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from models import Model, Tokenizer
from retro_jax.config import DecodeConfig
from retro_jax.decode import decode
from retro_jax.inputs import NonFiniteLogits, Prompt, check_capacity, prompt_ids
from retro_jax.metrics import Metrics
from retro_jax.prefill import extend
from retro_jax.sampling import Sampling, sample, sequence_keys
from retro_jax.sharding import new_state, under_mesh_of_weights
from retro_jax.sizes import MIN_CHUNK, batch_rows, program_length
from retro_jax.state import DecodeState

Progress = Callable[[str, int, int], None]
"""Called with the stage ("prefill" or "decode"), the tokens done and their total."""

_extend = jax.jit(extend, static_argnames=("model", "config"), donate_argnames="state")
_decode = jax.jit(decode, static_argnames=("model", "config", "steps", "sampling"), donate_argnames="state")


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
      texts: the generated texts, without the stop token; empty where the model has no tokenizer.
      tokens: the generated token ids, the stop token included.
      finished: whether each sequence ended by a stop token.
      metrics: of the decode steps; None if the prefill alone gave every token.
      config: how it was decoded.
      state: to go on from with `previous`; a call that does consumes it. Its first rows are the sequences;
        those after them, by which batches of similar sizes share one program, are empty.
      pending: each sequence's last token, which is not in the cache yet.
    """

    texts: list[str]
    tokens: list[list[int]]
    finished: list[bool]
    metrics: Metrics | None
    config: DecodeConfig
    state: DecodeState
    pending: np.ndarray


@under_mesh_of_weights
def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    stop_tokens: Sequence[int] | None = None,
    capacity: int | None = None,
    stream: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
    previous: Generation | None = None,
    steps_per_call: int = 16,
) -> Generation:
    """Generate a continuation of every prompt, on the devices that the weights lie on (see `sharding`).

    Args:
      model: from `load_model`.
      prompts: texts or token ids, of any lengths.
      config: how to decode.
      max_new_tokens: per sequence.
      sampling: how tokens are chosen; None: greedy.
      keys: one random key per sequence; None: from `sampling.seed` and the sequence's place in the batch.
      stop_tokens: tokens that end a sequence; None: the tokenizer's end-of-text and end-of-turn tokens.
      capacity: tokens per sequence that the cache holds, for later turns too; None: enough for this call.
      stream: called with the index of a sequence and the text it has grown by.
      progress: called as tokens are done.
      previous: the result of an earlier call with the same model and config, whose sequences these prompts
        continue as their next turn. Its state is consumed.
      steps_per_call: decode steps of one compiled call; `stream` is called after each.

    Raises:
      ValueError: a prompt is empty or out of the vocabulary, prompt and new tokens do not fit the capacity
        or the model's positions, or `previous` does not fit the prompts.
      TypeError: token ids are not whole numbers.
      NonFiniteLogits: a logit was NaN or infinite; its `partial` is the Generation up to there.
    """
    sampling = sampling or Sampling()
    if max_new_tokens < 1 or steps_per_call < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and steps_per_call {steps_per_call} must be at least 1"
        )
    ids = _turn_ids(model, prompts, previous)
    state = _state_for(model, config, ids, max_new_tokens, capacity, previous)
    stops = _stop_tokens(model, stop_tokens)

    state, logits = run_prefill(model, config, state, ids, progress)
    rows = logits.shape[0]
    keys = sequence_keys(sampling, rows) if keys is None else _padded_keys(keys, len(ids), rows)
    first = np.asarray(sample(logits, sampling, keys, state.length))
    output = _Output(model.tokenizer, config, len(ids), set(stops), stream)
    if not np.isfinite(np.asarray(logits)).all():
        raise NonFiniteLogits("the logits after the prompt are not finite", output.result([], state, first))
    output.append(first[:, None], np.ones((rows, 1), bool))

    pending, calls = jnp.asarray(first), []
    stops = jnp.asarray(stops, jnp.int32)
    idle = jnp.isin(pending, stops) | (jnp.arange(rows) >= len(ids))
    # Typed as what `decode` returns: of Python numbers it would be weakly typed, another program's argument.
    remaining = jnp.where(idle, 0, jnp.int32(max_new_tokens - 1))
    done = 1
    while bool((remaining > 0).any()):
        state, out = _decode(
            model.params,
            model.config,
            config,
            state,
            pending,
            steps_per_call,
            sampling,
            keys,
            stops,
            remaining,
        )
        pending, remaining = out.pending, out.remaining
        emitted, finite = np.asarray(out.emitted), np.asarray(out.finite)
        calls.append(out.metrics)
        # A token chosen from a logit that is not finite has no meaning, nor have those after it.
        output.append(np.asarray(out.tokens), emitted & np.logical_and.accumulate(finite, axis=1))
        if not finite.all():
            sequence, step = np.argwhere(~finite)[0]
            raise NonFiniteLogits(
                f"the logits of sequence {sequence} are not finite after {done + step} new tokens",
                output.result(calls, state, np.asarray(pending)),
            )
        done += steps_per_call
        if progress:
            progress("decode", min(done, max_new_tokens), max_new_tokens)
    output.flush()
    return output.result(calls, state, np.asarray(pending))


def _turn_ids(model: Model, prompts: Sequence[Prompt], previous: Generation | None) -> list[np.ndarray]:
    """Token ids to append per sequence; a later turn begins with the token that is still pending."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list; put a single prompt in brackets")
    if not len(prompts):
        raise ValueError("prompts are empty; give at least one")
    ids = [prompt_ids(model, prompt, index, previous is None) for index, prompt in enumerate(prompts)]
    if previous is None:
        return ids
    if len(ids) != len(previous.pending):
        raise ValueError(
            f"{len(ids)} prompts cannot continue {len(previous.pending)} sequences; give one for each"
        )
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(previous.state)):
        raise ValueError("previous was continued before, which consumed its state; continue the later result")
    return [np.concatenate([[token], row]) for token, row in zip(previous.pending, ids, strict=True)]


def _state_for(
    model: Model,
    config: DecodeConfig,
    ids: Sequence[np.ndarray],
    max_new_tokens: int,
    capacity: int | None,
    previous: Generation | None,
) -> DecodeState:
    """A fresh state, or that of the previous turn, with room for the ids and the new tokens."""
    used = np.zeros(len(ids), int) if previous is None else np.asarray(previous.state.length)[: len(ids)]
    needed = max(int(before) + len(row) for before, row in zip(used, ids, strict=True)) + max_new_tokens
    if previous is None:
        capacity = check_capacity(model.config, needed, capacity)
        return new_state(model.config, config, batch_rows(len(ids)), capacity)
    if config != previous.config:
        raise ValueError(f"the previous turn was decoded by {previous.config}; this one must be too")
    check_capacity(model.config, needed, previous.state.capacity)
    return previous.state


def _stop_tokens(model: Model, stop_tokens: Sequence[int] | None) -> list[int]:
    """The given stop tokens, or the tokenizer's."""
    if stop_tokens is None:
        return list(model.tokenizer.stop_ids) if model.tokenizer else []
    for token in stop_tokens:
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"stop token {token} lies outside the vocabulary (0..{model.config.vocab_size - 1})"
            )
    return list(stop_tokens)


def _padded_keys(keys: Key[Array, " B"], sequences: int, rows: int) -> Key[Array, " rows"]:
    """The sequences' keys, and any for the rows after them."""
    if keys.shape != (sequences,):
        raise ValueError(f"keys have shape {keys.shape} for {sequences} prompts; give one for each")
    return keys[jnp.minimum(jnp.arange(rows), sequences - 1)]


def run_prefill(
    model: Model,
    config: DecodeConfig,
    state: DecodeState,
    ids: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Append the ids by one compiled call per chunk; returns the state and the logits after them.

    Chunks are no longer than the longest prompt needs. Rows of the state after those of the ids get nothing;
    their logits are zeros.
    """
    rows = state.length.shape[0]
    lengths = np.zeros(rows, int)
    lengths[: len(ids)] = [len(row) for row in ids]
    total = int(lengths.max())
    chunk = program_length(total, MIN_CHUNK, config.prefill_chunk)
    padded = np.zeros((rows, -(-total // chunk) * chunk), np.int32)
    for row, values in zip(padded, ids, strict=False):
        row[: len(values)] = values
    logits: Float[Array, "B V"] = jnp.zeros((rows, model.config.vocab_size))
    for begin in range(0, total, chunk):
        counts: Int[np.ndarray, " B"] = np.clip(lengths - begin, 0, chunk).astype(np.int32)
        tokens = padded[:, begin : begin + chunk]
        state, fresh = _extend(model.params, model.config, config, state, tokens, counts)
        logits = jnp.where((counts > 0)[:, None], fresh, logits)
        if progress:
            progress("prefill", min(begin + chunk, total), total)
    return state, logits


class _Output:
    """Collects tokens per sequence and turns them into text as they come."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: DecodeConfig,
        batch: int,
        stops: set[int],
        stream: Callable[[int, str], None] | None,
    ):
        self.tokenizer, self.config, self.stops, self.stream = tokenizer, config, stops, stream
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.streamed = [""] * batch

    def append(self, tokens: Int[np.ndarray, "B steps"], emitted: np.ndarray) -> None:
        """Add the emitted tokens of one call; rows after the sequences hold none."""
        for row, chosen, mask in zip(self.tokens, tokens, emitted, strict=False):
            row.extend(int(token) for token in chosen[mask])
        for index in range(len(self.tokens)):
            # An unfinished character decodes to U+FFFD; hold it back until it is whole.
            self._stream(index, self.text(index).rstrip("\ufffd"))

    def flush(self) -> None:
        """Stream what was held back."""
        for index in range(len(self.tokens)):
            self._stream(index, self.text(index))

    def _stream(self, index: int, text: str) -> None:
        if self.stream and len(text) > len(self.streamed[index]):
            self.stream(index, text[len(self.streamed[index]) :])
            self.streamed[index] = text

    def finished(self, index: int) -> bool:
        return bool(self.tokens[index]) and self.tokens[index][-1] in self.stops

    def text(self, index: int) -> str:
        if self.tokenizer is None:
            return ""
        tokens = self.tokens[index]
        return self.tokenizer.decode(tokens[:-1] if self.finished(index) else tokens)

    def result(self, calls: list, state: DecodeState, pending: np.ndarray) -> Generation:
        batch = range(len(self.tokens))
        return Generation(
            texts=[self.text(index) for index in batch],
            tokens=self.tokens,
            finished=[self.finished(index) for index in batch],
            metrics=Metrics.gather(calls).of(slice(len(batch))) if calls else None,
            config=self.config,
            state=state,
            pending=pending[: len(batch)],
        )
