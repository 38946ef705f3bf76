"""Many prompts through few slots: a sequence that ends makes room for the next (continuous batching).

Here is what the host decides: which prompt goes where, and when a reply is whole. A round is one compiled
call of decode steps for all slots; while it runs, a chunk of the next prompts is read. Where a slot is free,
prompts are read first: steps would take as long without it. What consecutive prompts begin with is read once.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized

import jax
import numpy as np
from jaxtyping import Array, Key

from retro_jax.beginnings import runs
from retro_jax.cache import StepMetrics
from retro_jax.compilation import JitForMesh
from retro_jax.config import DecodeConfig
from retro_jax.decode import Decoded, decode
from retro_jax.inputs import NonFiniteLogits, Prompt, check_stop, check_stop_tokens, check_whole
from retro_jax.models import Model
from retro_jax.requests import Pending, Reply, Request, check_request
from retro_jax.sampling import KEY_KIND, Sampling, sequence_keys
from retro_jax.sharding import check_processes_agree, new_state, to_host, under_mesh_of_weights
from retro_jax.sizes import MIN_CHUNK, batch_rows, cache_capacity, newcomer_rows, program_length
from retro_jax.slots import insert, read, take
from retro_jax.state import DecodeState

_read = JitForMesh(read, static_argnames=("model", "config", "sampling"), donate_argnames="state")
_insert = jax.jit(insert, donate_argnames="state")
_decode = JitForMesh(
    decode, static_argnames=("model", "config", "steps", "sampling"), donate_argnames="state"
)
_keys = jax.jit(sequence_keys, static_argnames=("sampling", "batch"))


def generate_many(
    model: Model,
    prompts: Iterable[Prompt | Request],
    config: DecodeConfig,
    max_new_tokens: int,
    *,
    slots: int = 8,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    steps_per_call: int = 16,
) -> Iterator[Reply]:
    """Generate a continuation of every prompt, `slots` of them at a time, on the devices of the weights.

    As soon as one is finished the next takes its place, so that no reply waits for the longest of a batch.
    A reply is what `generate` makes of the prompt alone with the same key, but for ties within rounding:
    whatever shares its batch, and in whatever order prompts come. Programs depend on the number of slots, the
    capacity and the length of a chunk, and are compiled once for these.

    Prompts that follow each other in a list and begin with the same tokens, 64 or more, have these read once:
    examples before questions, the messages of a system, one prompt for several replies with a key for each.
    Each goes on from a copy of the state, whatever the method: the same numbers up to rounding, as chunks of
    the prompt end elsewhere. Put prompts that begin alike side by side.

    A list of prompts is checked at once. When an iterator fails, or a prompt that it gives is refused, or
    logits are not finite, no further prompt is taken; the replies that were begun are finished and given, and
    then the error is raised.

    Args:
      model: from `load_model`.
      prompts: texts, token ids or `Request`s; from an iterator, the next ones are taken when they are read.
      config: how to decode.
      max_new_tokens: of each reply, where its request does not say.
      slots: sequences that are decoded together. The cache holds those, newcomers whose prompts are read
        meanwhile, one for each 8 slots, at least one, and one for what several prompts begin with.
      sampling: how tokens are chosen; None: greedy.
      stop_tokens: tokens that end a reply; None: the tokenizer's end-of-text and end-of-turn tokens.
      stop: strings that end a reply as soon as its text has one of them; the text ends before it.
      capacity: tokens that the cache holds of each sequence, prompt and reply; None: what the prompts need,
        which must be a list then.
      steps_per_call: decode steps of one compiled call, after which finished sequences are replaced.

    Returns:
      Replies as they are finished; `Reply.index` says to which prompt.

    Raises:
      ValueError: a prompt is empty, out of the vocabulary, or does not fit the capacity or the model's
        positions together with its new tokens. Or a number is below 1, slots do not divide over the mesh,
        `stop` has an empty string or the model no tokenizer for it, the capacity is not within the model's
        positions or not known, or the processes of a mesh disagree.
      TypeError: prompts are a single one, token ids or numbers are not whole, or a key is none.
      NonFiniteLogits: a logit was NaN or infinite; its `partial` is the Reply up to there.
    """
    _agree(
        model,
        prompts=prompts if isinstance(prompts, Sized) else None,
        config=config,
        sampling=sampling,
        stop=(stop_tokens, stop),
        limits=(max_new_tokens, slots, capacity, steps_per_call),
    )
    if isinstance(prompts, str | Request):
        raise TypeError("prompts must be a list or an iterator; put a single prompt in brackets")
    check_whole(max_new_tokens=max_new_tokens, slots=slots, capacity=capacity, steps_per_call=steps_per_call)
    positions, chunk = model.config.max_positions, config.prefill_chunk
    if capacity is not None and capacity > positions:
        raise ValueError(
            f"capacity {capacity} is not within 1..{positions}, the positions of {model.config.name}"
        )
    check_stop(model, stop)
    stops = check_stop_tokens(model, stop_tokens)
    waiting: Iterable[Pending] = (
        check_request(model, index, prompt, max_new_tokens, capacity) for index, prompt in enumerate(prompts)
    )
    if isinstance(prompts, Sized):
        waiting = list(waiting)
        if not waiting:
            raise ValueError("prompts are empty; give at least one")
        _part_into_runs(waiting)
        mean = -(-sum(len(each.ids) - each.shared for each in waiting) // len(waiting))
        chunk = program_length(mean, MIN_CHUNK, chunk)  # so that most of it is not padding
        needed = max(len(each.ids) + each.max_new_tokens for each in waiting)
        capacity = cache_capacity(needed, positions) if capacity is None else capacity
    elif capacity is None:
        raise ValueError(
            "prompts come one by one, so that nobody knows how much room the longest needs; give capacity, "
            "or the prompts as a list"
        )
    sampling = sampling or Sampling()
    batch = _start(model, config, sampling, stops, stop, slots, capacity, chunk, steps_per_call)
    return _replies(model, batch, iter(waiting))


def _part_into_runs(waiting: Sequence[Pending]) -> None:
    """Tells all prompts what they share with those beside them."""
    left = iter(waiting)
    for count, shared in runs([each.ids for each in waiting]):
        for each in itertools.islice(left, count):
            each.shared = shared
        each.ends_run = True


class _Reading:
    """Tokens that are read into a state, a chunk of each row at a time.

    Args:
      ids: of at most R rows.
      keys: of these rows, the data of random keys for what follows their tokens.
      rows: R.
      chunk: tokens that one call reads of each.
      anew: whether they begin a prompt, in place of what the state held.
    """

    def __init__(
        self, ids: Sequence[np.ndarray], keys: Sequence[np.ndarray], rows: int, chunk: int, anew: bool
    ):
        self.lengths = np.zeros(rows, np.int32)
        self.lengths[: len(ids)] = [len(row) for row in ids]
        self.chunks = -(-int(self.lengths.max(initial=0)) // chunk)
        self.tokens = np.zeros((rows, self.chunks * chunk), np.int32)
        self.keys = np.zeros((rows, 2), np.uint32)
        for row, (own, key) in enumerate(zip(ids, keys, strict=True)):
            self.tokens[row, : len(own)], self.keys[row] = own, key
        self.chunk, self.anew, self.first = chunk, anew, []

    @property
    def done(self) -> bool:
        """Whether all of them are in the state."""
        return len(self.first) == self.chunks


class _Batch:
    """The slots and who is in them; every call of its methods is one of all processes that share the mesh."""

    def __init__(self, model, config, sampling, stops, stop, slots, capacity, chunk, steps):
        if slots % (devices := batch_rows(1)):
            raise ValueError(
                f"slots {slots} do not divide over {devices} devices of the mesh; use a multiple"
            )
        self.model, self.config, self.sampling = model, config, sampling
        self.stops, self.stop, self.chunk, self.steps = stops, stop, chunk, steps
        self.rows = newcomer_rows(slots)
        self.capacity = capacity
        self.state = new_state(model.config, config, slots, capacity)
        self.beside = new_state(model.config, config, self.rows, capacity)
        self.take = jax.jit(take, out_shardings=jax.tree.map(lambda array: array.sharding, self.beside))
        self.pending, self.remaining = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self.keys = np.zeros((slots, 2), np.uint32)
        self.sequences: dict[int, Pending] = {}
        self.more, self.error = True, None
        self.newcomers: dict[int, Pending] = {}
        """Those that have no slot yet, by row."""
        self.rest = _Reading((), (), self.rows, chunk, True)
        """What is read of newcomers alone."""
        self.head = np.zeros(0, np.int32)
        """What newcomers begin with in common."""
        self.heading, self.shared = _Reading((), (), 1, chunk, True), None

    @property
    def free(self) -> list[int]:
        """Slots that nobody is in."""
        return [slot for slot in range(len(self.pending)) if slot not in self.sequences]

    @property
    def done(self) -> bool:
        """Whether every reply was given."""
        return not (self.more or self.sequences or self.newcomers)

    def fail(self, error: Exception) -> None:
        """Takes no further prompts; the first error is raised when those that were taken are finished."""
        self.more, self.error = False, self.error or error

    def invite(self, sequences: list[Pending]) -> None:
        """Takes the next prompts, whose predecessors all have their slots."""
        asked = [(each.ids.tolist(), each.max_new_tokens, each.key) for each in sequences]
        check_processes_agree(prompts=(asked, self.more))
        for each in sequences:
            each.begin(self.model, self.stops, self.stop)
            if each.key is None:
                (each.key,) = np.asarray(jax.random.key_data(_keys(self.sampling, 1, each.index)))
        self.newcomers = dict(enumerate(sequences))
        shared = sequences[0].shared if sequences else 0  # all are of one run
        rests, keys = [each.ids[shared:] for each in sequences], [each.key for each in sequences]
        self.rest = _Reading(rests, keys, self.rows, self.chunk, not shared)
        if shared and not np.array_equal(self.head, head := sequences[0].ids[:shared]):
            self.head, rows = head, batch_rows(1)
            chunk = program_length(shared, MIN_CHUNK, self.config.prefill_chunk)
            self.heading = _Reading([head], [np.zeros(2, np.uint32)], rows, chunk, True)
            if self.shared is None:
                self.shared = new_state(self.model.config, self.config, rows, self.capacity)

    def round(self) -> list[Reply]:
        """Reads, places, decodes; returns the replies that were finished."""
        replies = []
        if self.free:
            self.read()
            replies = self.place()
            if self.free and (self.newcomers or self.more):
                return replies  # another chunk, or another prompt, before the next step
        if self.sequences:
            out = self.decode()
            self.read()
            replies += self.collect(out)
        return replies

    def read(self) -> None:
        """Reads a chunk of what newcomers begin with, or else of their prompts, if any is left."""
        if not self.heading.done:
            self.shared = self.read_chunk(self.shared, self.heading)
        elif not self.rest.done:
            if not (self.rest.anew or self.rest.first):
                self.beside = None  # its memory is free for the copies
                self.beside = self.take(self.shared, np.zeros(self.rows, np.int32))
            self.beside = self.read_chunk(self.beside, self.rest)

    def read_chunk(self, state: DecodeState, reading: _Reading) -> DecodeState:
        """Reads the next chunk into the state."""
        begin, chunk = len(reading.first) * reading.chunk, reading.chunk
        state, first = _read(
            self.model.params,
            self.model.config,
            self.config,
            state,
            reading.tokens[:, begin : begin + chunk],
            np.clip(reading.lengths - begin, 0, chunk),
            np.full(len(reading.lengths), reading.anew and not begin),
            self.sampling,
            _typed(reading.keys),
        )
        reading.first.append(first)
        return state

    def place(self) -> list[Reply]:
        """Puts newcomers whose prompts were read into free slots; returns the replies of one token."""
        replies = []
        if not (self.heading.done and self.rest.done and self.newcomers):
            return replies
        into = np.full(self.rows, len(self.pending), np.int32)
        firsts, free = to_host(self.rest.first), self.free
        for row, each in list(self.newcomers.items()):
            if not each.logprobs:
                first = firsts[(len(each.ids) - each.shared - 1) // self.chunk]
                if not first.finite[row]:
                    what = f"the logits after prompt {each.index} are not finite"
                    self.fail(NonFiniteLogits(what, each.reply()))
                    del self.newcomers[row]
                    continue
                each.append(first.tokens[row : row + 1], first.logprobs[row : row + 1])
            if each.ended:
                replies.append(each.reply())
            elif free:
                into[row] = slot = free.pop(0)
                self.sequences[slot], self.keys[slot] = each, each.key
                self.pending[slot], self.remaining[slot] = each.texts.tokens(0)[-1], each.max_new_tokens - 1
            else:
                continue
            del self.newcomers[row]
        if (into < len(self.pending)).any():
            self.state = _insert(self.state, self.beside, into)
        return replies

    def decode(self) -> Decoded:
        """Begins decode steps of all slots."""
        self.state, out = _decode(
            self.model.params,
            self.model.config,
            self.config,
            self.state,
            self.pending,
            self.steps,
            self.sampling,
            _typed(self.keys),
            np.array(self.stops, np.int32),
            self.remaining,
        )
        return out

    def collect(self, out: Decoded) -> list[Reply]:
        """Waits for decode steps and adds what they chose; returns the replies that were finished."""
        out, replies = to_host(out), []
        self.pending, self.remaining = out.pending.copy(), out.remaining.copy()
        for slot, each in list(self.sequences.items()):
            # A token chosen from a logit that is not finite has no meaning, nor have those after it.
            good = out.emitted[slot] & np.logical_and.accumulate(out.finite[slot])
            each.append(out.tokens[slot, good], out.logprobs[slot, good], _part(out.metrics, good, slot))
            broken = not out.finite[slot].all() and not each.ended
            if broken:
                new = len(each.logprobs)
                what = f"the logits of prompt {each.index} are not finite after {new} new tokens"
                self.fail(NonFiniteLogits(what, each.reply()))
            elif each.ended:
                replies.append(each.reply())
            if broken or each.ended:
                del self.sequences[slot]
                self.remaining[slot] = 0
        return replies


def _part(metrics: StepMetrics, steps: np.ndarray, slot: int) -> StepMetrics:
    return jax.tree.map(lambda array: array[steps, slot : slot + 1], metrics)


def _typed(keys: np.ndarray) -> Key[Array, " B"]:
    return jax.random.wrap_key_data(keys, impl=KEY_KIND)


_agree = under_mesh_of_weights(lambda _, **arguments: check_processes_agree(**arguments))
_start = under_mesh_of_weights(_Batch)
_invite = under_mesh_of_weights(lambda _, batch, sequences: batch.invite(sequences))
_round = under_mesh_of_weights(lambda _, batch: batch.round())


def _replies(model: Model, batch: _Batch, waiting: Iterator[Pending]) -> Iterator[Reply]:
    """Rounds until every reply was given; prompts are taken between them, under the caller's settings."""
    while not batch.done:
        if batch.more and not batch.newcomers:
            sequences = []
            while batch.more and len(sequences) < batch.rows and not (sequences and sequences[-1].ends_run):
                try:
                    sequences.append(next(waiting))
                except StopIteration:
                    batch.more = False
                except Exception as error:  # whatever it is, the replies to earlier prompts come first
                    batch.fail(error)
            _invite(model, batch, sequences)
        yield from _round(model, batch)
    if batch.error is not None:
        raise batch.error
