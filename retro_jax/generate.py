"""Text in, text out: prefill, then jitted scans of decode steps, for a batch of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from retro_jax.compilation import JitForMesh
from retro_jax.config import DecodeConfig
from retro_jax.decode import decode, negative_log_likelihood
from retro_jax.drafts import Acceptance, VerifiedMetrics
from retro_jax.exact_cache import keep
from retro_jax.inputs import (
    NonFiniteLogits,
    Prompt,
    check_capacity,
    check_keys,
    check_stop,
    check_stop_tokens,
    check_whole,
    prompt_ids,
)
from retro_jax.metrics import Metrics
from retro_jax.models import Model
from retro_jax.prompts import Progress, run_prefill
from retro_jax.sampling import Sampling, sample, sequence_keys
from retro_jax.sharding import check_processes_agree, new_state, to_host, under_mesh_of_weights
from retro_jax.sizes import batch_rows
from retro_jax.state import DecodeState
from retro_jax.texts import Texts
from retro_jax.verify import check_verify, verified_decode

_decode = JitForMesh(
    decode, static_argnames=("model", "config", "steps", "sampling"), donate_argnames="state"
)
_verified_decode = JitForMesh(
    verified_decode,
    static_argnames=("model", "config", "rounds", "k", "sampling"),
    donate_argnames="state",
)
_keep = jax.jit(keep, static_argnames=("model", "config", "rows"), donate_argnames="state")


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
      texts: the generated texts, without the stop token or string; empty where the model has no tokenizer.
      tokens: the generated token ids, the stop token or those of the stop string included.
      logprobs: natural logarithm of each token's probability in the model's whole distribution where it was
        chosen, at temperature 1 whatever the sampling; with `verify` that of full attention.
      finished: whether each sequence ended by a stop token or string.
      metrics: of the decode steps, or of the rounds of verified decoding; None if the prefill alone gave
        every token.
      config: how it was decoded.
      state: to go on from with `previous`; a call that does consumes it. Its first rows are the sequences;
        those after them, by which batches of similar sizes share one program, are empty.
      pending: each sequence's last token, which is not in the cache yet.
      turns: the tokens that each sequence generated since its last prompt: `tokens`, and before them those of
        earlier calls that this one went on from without a prompt.
      exact: whether the cache is full attention's: of prompts and verified tokens only.
      sampling: how tokens were chosen; `previous` does not hand it on.
      keys: the random keys that the call was given, likewise.
      verify: the bound of drafts that the call was given, likewise.
    """

    texts: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]
    metrics: Metrics | VerifiedMetrics | None
    config: DecodeConfig
    state: DecodeState
    pending: np.ndarray
    turns: list[list[int]]
    exact: bool
    sampling: Sampling
    keys: Key[Array, " B"] | None
    verify: int | None

    def __repr__(self) -> str:
        """Without its state."""
        return f"Generation({len(self.texts)} sequences, {sum(map(len, self.tokens))} tokens, {self.config})"


@under_mesh_of_weights
def generate(
    model: Model,
    prompts: Sequence[Prompt | None] | None,
    config: DecodeConfig,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    stream: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
    previous: Generation | None = None,
    steps_per_call: int = 16,
    verify: int | None = None,
) -> Generation:
    """Generate a continuation of every prompt, on the devices that the weights lie on (see `sharding`).

    Args:
      model: from `load_model`.
      prompts: texts or token ids, of any lengths. With `previous`, None goes on with a sequence, or with all
        of them, without a new prompt, as one longer call would have.
      config: how to decode.
      max_new_tokens: per sequence.
      sampling: how tokens are chosen; None: greedy.
      keys: one random key per sequence; None: from `sampling.seed` and the sequence's place in the batch.
      stop_tokens: tokens that end a sequence; None: the tokenizer's end-of-text and end-of-turn tokens.
      stop: strings that end a sequence as soon as its text has one of them, across tokens too; the text ends
        before it. Each step is then a compiled call of its own, so that `previous` can go on from there.
      capacity: tokens per sequence that the cache holds, for later turns too; None: enough for this call.
      stream: called with the index of a sequence and the text it has grown by.
      progress: called as tokens are done.
      previous: the result of an earlier call with the same model and config, or of `load_state`, whose
        sequences these prompts continue as their next turn. Its state is consumed, also where an interrupt
        or an error of `stream` or `progress` ends the call: `save_state` keeps one for that.
      steps_per_call: decode steps of one compiled call; `stream` is called after each.
      verify: drafts at most that `config` makes between two checks by full attention, whose text this then
        is (see `verify`): the same as without, from the same keys, but for ties within rounding. None: the
        text is that of `config`.

    Raises:
      ValueError: a prompt is empty or out of the vocabulary, prompt and new tokens do not fit the capacity
        or the model's positions, `previous` does not fit the prompts, `stop` has an empty string or the model
        no tokenizer for it, keys are not one for each prompt, the processes of a mesh disagree, or `config`
        cannot draft, see `verify.check_verify`, or `previous` holds tokens that nothing verified.
      TypeError: token ids or numbers are not whole, or keys are not those of `jax.random.key`.
      NonFiniteLogits: a logit was NaN or infinite; its `partial` is the Generation up to there.
    """
    check_processes_agree(
        prompts=prompts,
        config=config,
        sampling=sampling,
        keys=keys,
        stop=(stop_tokens, stop),
        limits=(max_new_tokens, capacity, steps_per_call, verify),
        previous=previous and previous.turns,
    )
    sampling = sampling or Sampling()
    check_whole(max_new_tokens=max_new_tokens, steps_per_call=steps_per_call)
    ids = _turn_ids(model, prompts, previous)
    stops = check_stop_tokens(model, stop_tokens)
    check_stop(model, stop)
    given_keys = None if keys is None else check_keys(keys, len(ids))
    keys = sequence_keys(sampling, len(ids)) if keys is None else given_keys
    exact = previous is None or previous.exact
    if verify is not None:
        check_verify(config, verify, model=model.config)
        if not exact:
            raise ValueError(
                f"verify {verify} was asked for, but previous has tokens that were decoded without, whose "
                "keys and values are not full attention's; begin anew with verify"
            )
    state = _state_for(model, config, ids, max_new_tokens, capacity, previous)
    if verify is not None:
        check_verify(config, verify, state.capacity)

    of_rows = keys[np.minimum(np.arange(state.length.shape[0]), len(ids) - 1)]
    steps = 1 if stop else steps_per_call
    made = model, config, state, ids, previous, max_new_tokens, sampling, of_rows, given_keys
    run = _Run(*made, stops, stop, stream, progress, steps, verify)
    if run.prompted.any():
        run.read_prompts()
    while (run.remaining > 0).any():
        run.decode()
    run.output.flush()
    return run.result()


@dataclass
class _Run:
    """What `generate` knows between its calls of the device: what it was given, and what follows from that.

    Attributes:
      keys: of each row of the state.
      given_keys: what the caller gave.
      steps: of one call.
      prompted: sequences that have a prompt, whose first token is that of the prefill.
      remaining: tokens that each sequence may still generate.
      output: tokens and texts so far.
    """

    model: Model
    config: DecodeConfig
    state: DecodeState
    ids: Sequence[np.ndarray]
    previous: InitVar[Generation | None]
    max_new_tokens: int
    sampling: Sampling
    keys: Key[Array, " rows"]
    given_keys: Key[Array, " B"] | None
    stops: Sequence[int]
    stop: Sequence[str]
    stream: InitVar[Callable[[int, str], None] | None]
    progress: Progress | None
    steps: int
    verify: int | None

    def __post_init__(self, previous, stream):
        batch = len(self.ids)
        self.acceptance = None if self.verify is None else to_host(Acceptance.unknown(self._rows))
        self.exact = previous is None or previous.exact
        self.pending = np.zeros(batch, np.int32) if previous is None else previous.pending
        self.logprobs, self.calls, self.done = [[] for _ in self.ids], [], 0
        self.prompted = np.array([len(row) > 0 for row in self.ids])
        turns = [[] if new else previous.turns[index] for index, new in enumerate(self.prompted)]
        self.output = Texts(self.model.tokenizer, turns, self.stops, self.stop, stream)
        self.remaining = np.where(self.output.ended, 0, self.max_new_tokens).astype(np.int32)

    @property
    def _rows(self) -> int:
        """Of the state; those after the sequences hold none."""
        return self.state.length.shape[0]

    def read_prompts(self) -> None:
        """Prefills, which gives each prompted sequence its first token."""
        self.state, logits = run_prefill(self.model, self.config, self.state, self.ids, self.progress)
        chosen = sample(logits, self.sampling, self.keys, self.state.length)
        likely = -negative_log_likelihood(logits, chosen)
        chosen, likely, finite = to_host((chosen, likely, jnp.isfinite(logits).all()))
        self.pending = np.where(self.prompted, chosen[: len(self.ids)], self.pending)
        if not finite:
            raise NonFiniteLogits("the logits after the prompt are not finite", self.result())
        self.output.append(self.pending[:, None], self.prompted[:, None])
        self._note(likely[: len(self.ids), None], self.prompted[:, None])
        self.done = 1
        self.remaining = np.where(self.output.ended, 0, self.remaining - self.prompted)

    def decode(self) -> None:
        """One compiled call: some steps, or rounds of verified decoding."""
        verify, output, batch = self.verify, self.output, len(self.ids)
        pending, remaining = (_padded(values, self._rows) for values in (self.pending, self.remaining))
        arguments = self.model.params, self.model.config, self.config, self.state, pending
        inputs = self.sampling, self.keys, np.array(self.stops, np.int32), remaining
        if verify is None:
            self.state, out = _decode(*arguments, self.steps, *inputs)
        else:
            rounds = max(self.steps // (verify + 1), 1)
            self.state, out = _verified_decode(*arguments, rounds, verify, *inputs, self.acceptance)
            self.acceptance = to_host(out.acceptance)
        self.calls.append(out.metrics)
        fetched = to_host((out.tokens, out.emitted, out.logprobs, out.finite, out.pending, out.remaining))
        tokens, emitted, likely, finite, self.pending, remaining = (values[:batch] for values in fetched)
        # A token chosen from a logit that is not finite has no meaning, nor have those after it.
        good = emitted & np.logical_and.accumulate(finite, axis=1)
        self._note(likely, good)
        if verify is None or not self.stop:
            output.append(tokens, good)
        else:
            self._append_until_stop(tokens, good)
        if not finite.all():
            sequence = int(np.argwhere(~finite)[0][0])
            raise NonFiniteLogits(
                f"the logits of sequence {sequence} are not finite after {len(output.tokens(sequence))} new "
                "tokens",
                self.result(),
            )
        self.remaining = np.where(output.ended, 0, remaining)
        self.done += int(emitted.sum(axis=1).max())
        if self.progress:
            self.progress("decode", min(self.done, self.max_new_tokens), self.max_new_tokens)

    def result(self) -> Generation:
        """What there is by now."""
        output, batch, verify = self.output, len(self.ids), self.verify
        gather = (Metrics if verify is None else VerifiedMetrics).gather
        tokens = [output.tokens(index) for index in range(batch)]
        verified = verify is not None or self.config.attention.dense
        return Generation(
            texts=[output.text(index) for index in range(batch)],
            tokens=tokens,
            logprobs=[own[: len(row)] for own, row in zip(self.logprobs, tokens, strict=True)],
            finished=list(output.ended),
            metrics=gather(self.calls).of(slice(batch)) if self.calls else None,
            config=self.config,
            state=self.state,
            pending=self.pending,
            turns=output.turns,
            exact=self.exact and (not self.calls or verified),
            sampling=self.sampling,
            keys=self.given_keys,
            verify=verify,
        )

    def _note(self, likely: Float[np.ndarray, "B T"], emitted: Bool[np.ndarray, "B T"]) -> None:
        """Adds the log-probabilities of the emitted tokens to those of each sequence."""
        for own, values, mask in zip(self.logprobs, likely, emitted, strict=True):
            own.extend(values[mask].tolist())

    def _append_until_stop(self, tokens: Int[np.ndarray, "B T"], emitted: Bool[np.ndarray, "B T"]) -> None:
        """Adds the tokens of one verified round, each sequence's up to where a stop string is whole.

        State and pending tokens become what they were there.
        """
        counts = np.zeros(len(tokens), np.int32)
        for step in range(tokens.shape[1]):
            fresh = emitted[:, step] & ~np.array(self.output.ended)
            self.output.append(tokens[:, step : step + 1], fresh[:, None])
            counts += fresh
        over = emitted.sum(axis=1, dtype=np.int32) - counts
        if not over.any():
            return
        start = self.state.length - _padded(counts + over, self._rows)
        arguments = self.model.params, self.model.config, self.config, self.state
        self.state = _keep(*arguments, start, _padded(counts, self._rows), tokens.shape[1])
        last = np.take_along_axis(tokens, np.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        self.pending = np.where(over > 0, last, self.pending)


def _turn_ids(
    model: Model, prompts: Sequence[Prompt | None] | None, previous: Generation | None
) -> list[np.ndarray]:
    """Token ids to append per sequence; a later turn begins with the token that is still pending.

    None are those of a sequence that goes on without a prompt.
    """
    if prompts is None and previous is not None:
        prompts = [None] * len(previous.pending)
    if prompts is None or (previous is None and any(prompt is None for prompt in prompts)):
        raise ValueError("a prompt is None; only a sequence of a previous result goes on without one")
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list; put a single prompt in brackets")
    if not len(prompts):
        raise ValueError("prompts are empty; give at least one")
    ids = [
        np.zeros(0, np.int32) if prompt is None else prompt_ids(model, prompt, index, previous is None)
        for index, prompt in enumerate(prompts)
    ]
    if previous is None:
        return ids
    if len(ids) != len(previous.pending):
        raise ValueError(
            f"{len(ids)} prompts cannot continue {len(previous.pending)} sequences; give one for each"
        )
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(previous.state)):
        raise ValueError(
            "previous was continued before, which consumed its state; continue the later result, or, where "
            "that call did not end, what `save_state` had kept"
        )
    return [
        np.concatenate([[token], row]) if len(row) else row
        for token, row in zip(previous.pending, ids, strict=True)
    ]


def _state_for(
    model: Model,
    config: DecodeConfig,
    ids: Sequence[np.ndarray],
    max_new_tokens: int,
    capacity: int | None,
    previous: Generation | None,
) -> DecodeState:
    """A fresh state, or that of the previous turn, with room for the ids and the new tokens."""
    used = np.zeros(len(ids), int) if previous is None else to_host(previous.state.length)[: len(ids)]
    needed = max(int(before) + len(row) for before, row in zip(used, ids, strict=True)) + max_new_tokens
    if previous is None:
        capacity = check_capacity(model.config, needed, capacity)
        return new_state(model.config, config, batch_rows(len(ids)), capacity)
    if config != previous.config:
        raise ValueError(f"the previous turn was decoded by {previous.config}; this one must be too")
    check_capacity(model.config, needed, previous.state.capacity)
    return previous.state


def _padded(values: Int[np.ndarray, " B"], rows: int) -> Int[np.ndarray, " rows"]:
    """The values of the sequences, and zeros for the rows after them."""
    return np.pad(values, (0, rows - len(values)))
