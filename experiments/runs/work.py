"""A run's work: examples to token ids, ids to batches, batches through each method, results to lines.

A result depends on the configuration alone, not on what was finished before: random draws follow the example
and the sample. A fixed batch of which some rows are missing is decoded as a whole; where sequences come and
go, missing replies are made alone, which are the same but for ties within rounding.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from retro_jax import (
    DecodeConfig,
    Metrics,
    NonFiniteLogits,
    Request,
    Sampling,
    generate,
    generate_many,
    score,
)
from retro_jax.experiments.tasks import Asked, Example, Filled, Passage, Task
from retro_jax.experiments.tasks.base import THINK
from retro_jax.models import Model, Tokenizer
from retro_jax.models.config import ModelConfig
from retro_jax.sizes import cache_capacity

ROUNDS = 8
"""Replies that a slot makes of a batch whose sequences come and go, about."""


@dataclass(frozen=True)
class Row:
    """One reply to be made.

    Attributes:
      example: what is asked.
      sample: its number among the replies to the example.
      prompt: token ids to read at once.
      forced: token ids to decode along; empty if the reply is generated.
      spans: [start, end) within `forced` of each answer.
      reasoning: whether the chat template has begun the reply's reasoning, so that its mark is in the prompt.
    """

    example: Example
    sample: int
    prompt: tuple[int, ...]
    forced: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    reasoning: bool = False

    @property
    def tokens(self) -> int:
        """Positions that the row may take."""
        return len(self.prompt) + (len(self.forced) or self.example.max_new_tokens)


def encode(tokenizer: Tokenizer, example: Example, sample: int = 0) -> Row:
    """An example as token ids.

    Raises:
      ValueError: a passage is shorter than it should be, or an example cannot be filled up to its length.
    """
    if isinstance(example, Filled):
        example = example.fitted(lambda filled: len(_prompt(tokenizer, filled)[0]))
    if isinstance(example, Passage):
        ids = tokenizer.encode(example.prompt)
        wanted = example.prompt_tokens + example.max_new_tokens
        if len(ids) < wanted:
            raise ValueError(f"{example.id} has {len(ids)} tokens, fewer than task.tokens {wanted}; lower it")
        return Row(
            example, sample, tuple(ids[: example.prompt_tokens]), tuple(ids[example.prompt_tokens : wanted])
        )
    prompt, reasoning = _prompt(tokenizer, example)
    forced, spans = [], []
    if isinstance(example, Asked):
        for cue, answer in zip(example.cues, example.answers, strict=True):
            forced += tokenizer.encode(cue, add_bos=False)
            start = len(forced)
            forced += tokenizer.encode(answer, add_bos=False)
            spans.append((start, len(forced)))
    return Row(example, sample, tuple(prompt), tuple(forced), tuple(spans), reasoning)


def _prompt(tokenizer: Tokenizer, example: Example) -> tuple[list[int], bool]:
    """The ids of an example's prompt, and whether it begins the reply's reasoning."""
    if example.chat and tokenizer.chat_template is not None:
        text = tokenizer.chat([{"role": "user", "content": example.prompt}]) + example.reply
        return tokenizer.encode(text, add_bos=False), text.rstrip().endswith(THINK)
    return tokenizer.encode(example.prompt + example.reply), False


def make_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows of one reply limit and of similar length together, the longest first: too little memory shows."""
    limits: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-row.tokens, row.example.id, row.sample)):
        limits.setdefault(row.example.max_new_tokens, []).append(row)
    return [alike[start : start + size] for alike in limits.values() for start in range(0, len(alike), size)]


def check_positions(model: ModelConfig, rows: Sequence[Row]) -> None:
    """Raises ValueError if an example does not fit the model's positions."""
    longest = max(rows, key=lambda row: row.tokens)
    if longest.tokens > model.max_positions:
        raise ValueError(
            f"{longest.example.id} takes {longest.tokens} positions (prompt {len(longest.prompt)}), "
            f"{model.name} has {model.max_positions}; make the task's examples or replies shorter"
        )


def decode_batch(
    model: Model,
    config: DecodeConfig,
    task: Task,
    batch: Sequence[Row],
    size: int,
    sampling: Sampling,
    progress,
) -> list[dict]:
    """Decodes a batch by one method; returns a result per row.

    Args:
      model: the model, its weights on the mesh if there is one.
      config: how to decode.
      task: grades what was generated.
      batch: rows of one kind, all forced or all generated.
      size: sequences to decode; the batch is filled up with copies of its last row.
      sampling: how tokens are chosen.
      progress: as `Progress`.
    """
    filled = [*batch, *[batch[-1]] * (size - len(batch))]
    results = _force if batch[0].forced else _generate
    found = results(model, config, task, filled, _capacity(model, batch), sampling, progress)
    return [_about(row) | result for row, result in zip(batch, found, strict=False)]


def decode_many(
    model: Model,
    config: DecodeConfig,
    task: Task,
    batch: Sequence[Row],
    missing: Sequence[int],
    slots: int,
    sampling: Sampling,
) -> Iterator[tuple[int, dict, float]]:
    """Generates replies of a batch by one method, of which one that ends makes room for the next.

    Args:
      model: see `decode_batch`, as for what is not said here.
      config: how to decode.
      task: grades what was generated.
      batch: rows that are generated.
      missing: places in the batch of those that are wanted; the cache has room for any.
      slots: sequences that are decoded together.
      sampling: how tokens are chosen.

    Yields:
      A place in the batch, its result as soon as it is finished, and the seconds that were waited for it.

    Raises:
      NonFiniteLogits: see `generate_many`; the message names the example.
    """
    start, rows = time.perf_counter(), [batch[place] for place in missing]
    requests = [
        Request(row.prompt, row.example.max_new_tokens, key)
        for row, key in zip(rows, _keys(sampling, rows), strict=True)
    ]
    longest, capacity = max(request.max_new_tokens for request in requests), _capacity(model, batch)
    replies = generate_many(
        model, requests, config, longest, slots=slots, sampling=sampling, capacity=capacity
    )
    try:
        for reply in replies:
            waited, row = time.perf_counter() - start, rows[reply.index]
            result = _graded(model, task, row, reply.tokens, reply.finished)
            yield missing[reply.index], _about(row) | result | _loaded(reply.metrics, 0), waited
            start = time.perf_counter()
    except NonFiniteLogits as error:
        broken = error.partial
        raise NonFiniteLogits(
            f"the logits of {rows[broken.index].example.id} are not finite after {len(broken.tokens)} new "
            "tokens; the replies that were begun before are kept",
            broken,
        ) from None


def _capacity(model: Model, batch: Sequence[Row]) -> int:
    """Tokens that the cache must hold of each row of a batch."""
    return cache_capacity(max(row.tokens for row in batch), model.config.max_positions)


def _about(row: Row) -> dict:
    """What a result tells of its row: how long the prompt is, and its part in a task of several."""
    part = {"part": row.example.part} if isinstance(row.example, Filled) else {}
    return {"prompt_tokens": len(row.prompt)} | part


def _graded(model: Model, task: Task, row: Row, tokens: Sequence[int], finished: bool) -> dict:
    """What a result tells of a reply."""
    text = model.tokenizer.decode(tokens[:-1] if finished else tokens)
    scores = task.grade(row.example, THINK * row.reasoning + text)
    return {"scores": scores, "tokens": len(tokens), "finished": finished, "text": text}


def _generate(model, config, task, rows, capacity, sampling, progress) -> list[dict]:
    made = generate(
        model,
        [row.prompt for row in rows],
        config,
        max(row.example.max_new_tokens for row in rows),
        sampling=sampling,
        keys=_keys(sampling, rows),
        capacity=capacity,
        progress=progress,
    )
    results = []
    for index, row in enumerate(rows):
        tokens = made.tokens[index][: row.example.max_new_tokens]
        finished = made.finished[index] and len(tokens) == len(made.tokens[index])
        results.append(_graded(model, task, row, tokens, finished) | _loaded(made.metrics, index))
    return results


def _force(model, config, task, rows, capacity, sampling, progress) -> list[dict]:
    measured = score(
        model,
        [np.array(row.prompt + row.forced, np.int32) for row in rows],
        config,
        prompt_tokens=[len(row.prompt) for row in rows],
        capacity=capacity,
        progress=progress,
    )
    results = []
    for index, row in enumerate(rows):
        nll, hits = measured.nll[index, : len(row.forced)], measured.hits[index]
        if row.spans:
            result = {
                "scores": [float(hits[start:end].all()) for start, end in row.spans],
                "nll": [round(float(nll[start:end].mean()), 6) for start, end in row.spans],
            }
        else:
            result = {"nll": [round(float(value), 6) for value in nll]}
        results.append(result | {"tokens": len(row.forced)} | _loaded(measured.metrics, index))
    return results


def _keys(sampling: Sampling, rows: Sequence[Row]) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in)
    names = np.array([zlib.crc32(row.example.id.encode()) for row in rows], np.uint32)
    root = jax.random.key(sampling.seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(root, names)
    return fold(keys, np.array([row.sample for row in rows], np.uint32))


def _loaded(metrics: Metrics | None, index: int) -> dict:
    """What the decode steps of one sequence loaded; nothing if there was none."""
    if metrics is None:
        return {}
    own = Metrics(
        *(
            getattr(metrics, name)[:, index : index + 1]
            for name in ("pages_attended", "pages_loaded", "kv_bytes")
        )
    )
    found = own.summary()
    return found if found.pop("steps") else {}
