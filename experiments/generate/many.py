"""Prompts from a file of JSON lines, replies into another, which is gone on with after any stop.

    prompts   {"prompt": a text, or token ids} or {"messages": [{"role": ..., "content": ...}, ...]},
              and where wanted "id" (else the number of the line) and "max_new_tokens"
    replies   {"id", "made_by", "prompt_tokens", "text", "tokens", "logprobs", "finished"}, in the order in
              which they were finished; "made_by" tells the prompt and all that decides about its reply

A random draw follows the id, so that a reply does not depend on what was finished before.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from retro_jax import DecodeConfig, Model, NonFiniteLogits, Request, Sampling, generate_many
from retro_jax.experiments.generate import chat
from retro_jax.experiments.io.files import check_writable
from retro_jax.experiments.io.folders import digest
from retro_jax.experiments.io.lines import LineFile, read_lines
from retro_jax.experiments.io.models import check_positions, check_tokenizer
from retro_jax.inputs import check_token_ids
from retro_jax.models.config import ModelConfig
from retro_jax.requests import Reply, check_request, check_room
from retro_jax.sampling import KEY_KIND

FIELDS = ("id", "prompt", "messages", "max_new_tokens")

WITHOUT_CHAT = ", so it cannot chat; use another model, or token ids"
"""What a model without a tokenizer is told."""

BEGIN = b'{"id": '
"""Of every reply."""


@dataclass(frozen=True)
class Line:
    """One line of a file of prompts.

    Attributes:
      number: of the line, from 1.
      id: by which its reply is known.
      prompt: a text or token ids; None where there are messages.
      messages: a conversation up to where the reply begins.
      max_new_tokens: of the reply.
    """

    number: int
    id: str | int
    prompt: str | tuple[int, ...] | None
    messages: tuple[Mapping[str, str], ...] | None
    max_new_tokens: int

    @property
    def made_by(self) -> list:
        """What of the line decides about its reply."""
        return [self.prompt, self.messages, self.max_new_tokens]


def read_prompts(path: Path, max_new_tokens: int) -> list[Line]:
    """The prompts in a file of JSON lines; empty lines are passed over.

    Args:
      path: the file, in UTF-8.
      max_new_tokens: where a line does not say.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no prompt, two have the same id, or there is none.
    """
    found: dict[str | int, Line] = {}
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        line = _line(f"{path} line {number}", number, text, max_new_tokens)
        if other := found.get(line.id):
            raise ValueError(
                f"{path} line {number} has the id {line.id!r} of line {other.number}; give each its own"
            )
        found[line.id] = line
    if not found:
        raise ValueError(f'{path} has no prompts; give lines such as {{"prompt": "Once upon a time"}}')
    return list(found.values())


def _line(where: str, number: int, text: bytes, max_new_tokens: int) -> Line:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError(f'{where} must be an object with "prompt" or "messages", one of them')
    if unknown := [key for key in value if key not in FIELDS]:
        raise ValueError(f"{where} has {unknown[0]!r}, which is not read; use {', '.join(FIELDS)}")
    prompt, messages = value.get("prompt"), value.get("messages")
    new, name = value.get("max_new_tokens", max_new_tokens), value.get("id", number)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    elif "prompt" in value and not isinstance(prompt, str):
        raise ValueError(f"{where} has a prompt that is neither a text nor a list of token ids")
    if "messages" in value:
        messages = tuple(messages) if isinstance(messages, list) else ()
        if not messages or not all(
            isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages
        ):
            raise ValueError(f'{where} has messages that are no list of {{"role": ..., "content": ...}}')
    if type(new) is not int or new < 1:
        raise ValueError(f"{where} has max_new_tokens {new!r}; it must be a whole number from 1 on")
    if type(name) not in (str, int):
        raise ValueError(f"{where} has the id {name!r}; it must be a text or a whole number")
    if (half := _half_character(value)) is not None:
        raise ValueError(f"{where} has half of a character, {half!r}; write it with the other half")
    return Line(number, name, prompt, messages, new)


def _half_character(value: object) -> str | None:
    """A half of a surrogate pair without the other, which no UTF-8 can tell; None if there is none."""
    match value:
        case str():
            return next((mark for mark in value if "\ud800" <= mark <= "\udfff"), None)
        case dict():
            return _half_character([*value, *value.values()])
        case list():
            return next((half for item in value if (half := _half_character(item)) is not None), None)
    return None


def check_out(prompts: Path, out: Path) -> None:
    """Refuses a file that replies cannot be added to, before anything of it is changed.

    Args:
      prompts: the file of prompts.
      out: the file for their replies, which need not be there yet, nor its folder.

    Raises:
      ValueError: it is the file of prompts, or holds something else than replies.
      OSError: it is a folder, or cannot be written.
    """
    check_writable(out.parent)
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; choose a file in it for --out")
    if not out.exists():
        return
    if out.samefile(prompts):
        raise ValueError(f"{out} is the file of the prompts; choose another --out")
    with out.open("rb") as file:
        line = file.readline()
    try:
        value = json.loads(line)
    except ValueError:  # a reply that was torn by a kill, if anything
        replies = line.startswith(BEGIN[: len(line)])
    else:
        replies = isinstance(value, dict) and "made_by" in value
    if not replies:
        raise ValueError(f"{out} holds something else than replies; choose another --out")


@dataclass(frozen=True)
class Work:
    """What a file of prompts asks for, and how it is decoded.

    Attributes:
      model: the model.
      asked: what "made_by" tells of it, beside its prompt.
      config: how to decode.
      sampling: how tokens are chosen.
      ids: token ids of each line.
      slots: sequences that are decoded together.
      capacity: tokens that the cache holds of each; None: as many as the longest needs.
    """

    model: Model
    asked: Mapping[str, object]
    config: DecodeConfig
    sampling: Sampling
    ids: Mapping[str | int, np.ndarray]
    slots: int
    capacity: int | None


def check_lines(sizes: ModelConfig, lines: Sequence[Line], capacity: int | None) -> None:
    """Raises ValueError if a line does not fit a model or the cache; a text has one token at least."""
    if capacity:
        check_positions(sizes, capacity, "--capacity", capacity)
    for line in lines:
        known = 1
        if isinstance(line.prompt, tuple):
            known = len(check_token_ids(sizes, line.prompt, f"prompt {line.number}"))
        check_room(sizes, line.number, known + line.max_new_tokens, capacity)


def without_tokenizer(lines: Sequence[Line], as_message: bool) -> str:
    """How a model without a tokenizer is refused, see `check_tokenizer`; "": it is not."""
    texts = [line for line in lines if not isinstance(line.prompt, tuple)]
    if any(as_message or line.messages for line in texts):
        return WITHOUT_CHAT
    return f'; give prompt {texts[0].number} as token ids, {{"prompt": [1, 2, 3]}}' if texts else ""


def token_ids(
    model: Model, lines: Sequence[Line], as_message: bool, capacity: int | None
) -> dict[str | int, np.ndarray]:
    """The token ids of each line, by its id.

    Args:
      model: whose tokenizer and chat template are used.
      lines: from `read_prompts`.
      as_message: whether a text is a user's message.
      capacity: that prompts and replies must fit.

    Raises:
      ValueError: a prompt cannot be read or does not fit, which the message calls by the number of its line.
    """
    found = {}
    for line in lines:
        prompt = line.prompt
        if line.messages is not None or (as_message and isinstance(prompt, str)):
            check_tokenizer(model.config.name, model.tokenizer is not None, WITHOUT_CHAT)
            turns = line.messages or ({"role": "user", "content": prompt},)
            prompt = chat.prompt(model.tokenizer, turns)
        found[line.id] = check_request(model, line.number, prompt, line.max_new_tokens, capacity).ids
    return found


def reply_to(work: Work, lines: Sequence[Line], out: Path) -> Iterator[tuple[Reply | None, int]]:
    """Writes the replies that a file does not have yet, each as soon as it is finished.

    Yields:
      None and how many were there, then each new reply and how many there are.

    Raises:
      ValueError: the file has replies to other prompts, or made in another way, or another process writes it.
      OSError: it cannot be written.
      NonFiniteLogits: see `generate_many`.
    """
    made_by = {line.id: digest([dict(work.asked), line.made_by]) for line in lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    with LineFile(out) as file:
        there = {found["id"]: found["made_by"] for found in read_lines([out], ("id", "made_by"))}
        for name, by in there.items():
            if made_by.get(name) != by:
                raise ValueError(
                    f"{out} has a reply {name!r} to another prompt, or that was made in another way; choose "
                    "another --out"
                )
        missing = [line for line in lines if line.id not in there]
        done = len(there)
        yield None, done
        if not missing:
            return
        root = jax.random.key(work.sampling.seed, impl=KEY_KIND)
        requests = [
            Request(
                work.ids[line.id],
                line.max_new_tokens,
                jax.random.fold_in(root, np.uint32(zlib.crc32(json.dumps(line.id).encode()))),
            )
            for line in missing
        ]
        try:
            for reply in generate_many(
                work.model,
                requests,
                work.config,
                max(line.max_new_tokens for line in lines),
                slots=work.slots,
                sampling=work.sampling,
                capacity=work.capacity,
            ):
                name = missing[reply.index].id
                file.append([{"id": name, "made_by": made_by[name]} | _values(reply)])
                done += 1
                yield reply, done
        except NonFiniteLogits as error:
            broken = error.partial
            raise NonFiniteLogits(
                f"the logits of prompt {missing[broken.index].id!r} are not finite after "
                f"{len(broken.tokens)} new tokens; other replies that were begun are in {out}",
                broken,
            ) from None


def _values(reply: Reply) -> dict:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "text": reply.text,
        "tokens": reply.tokens,
        "logprobs": [round(value, 6) for value in reply.logprobs],
        "finished": reply.finished,
    }
