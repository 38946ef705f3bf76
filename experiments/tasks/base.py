"""What a task is: examples to decode, and how a decoded text is graded."""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt to continue freely; the task grades the text.

    Attributes:
      id: unique within the task, and the same in every run with the same seed.
      prompt: the user's message, or plain text.
      answers: what is right, by position in the reply.
      max_new_tokens: the reply's limit.
      chat: put the prompt into the model's chat template, where it has one.
      reply: how the reply begins; given to the model, not generated, and not part of what is graded.
    """

    id: str
    prompt: str
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    chat: bool = False
    reply: str = ""

    def told(self) -> dict:
        """What the folder of a run knows the example by, as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Asked(Example):
    """Decoded along: after the prompt each cue and its answer, all given.

    An answer is right when every token of it is the most likely one at its place. `max_new_tokens` is unused.

    Attributes:
      cues: text before each answer.
    """

    cues: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Passage(Example):
    """A text to decode along, measured by the likelihood of its tokens.

    Attributes:
      prompt_tokens: tokens of `prompt` that are read at once; the `max_new_tokens` after them are scored.
    """

    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Filled(Example):
    """Made to measure: as much lies around what is asked as a number of tokens has room for.

    Until the tokenizer is known, `prompt` is the shortest that there is; see `fitted`.

    Attributes:
      part: the part of the task that it belongs to, which reports tell apart.
      length: tokens of prompt and reply, at most.
      fill: the prompt with so many pieces; the same number always gives the same one, a larger one a longer.
      least: pieces that the shortest prompt has.
      most: pieces that there are; None: any number.
      data: digest of the data that `fill` takes pieces from; empty if they are made by code.
    """

    part: str
    length: int
    fill: Callable[[int], str]
    least: int = 0
    most: int | None = None
    data: str = ""

    def told(self) -> dict:
        """As in `Example`: what it is filled with follows from the other fields."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "fill"}

    def fitted(self, tokens: Callable[[Example], int]) -> "Filled":
        """The example with the longest prompt that has room.

        Args:
          tokens: of an example's prompt.

        Raises:
          ValueError: even the shortest prompt is too long, or there is too little to fill it with.
        """
        room = self.length - self.max_new_tokens

        def measured(pieces: int) -> tuple[int, int]:
            return pieces, tokens(replace(self, prompt=self.fill(pieces)))

        low, high = measured(self.least), None
        if low[1] > room:
            raise ValueError(
                f"{self.id} takes {low[1] + self.max_new_tokens} tokens at least, over task.length "
                f"{self.length}; raise it"
            )
        # Lengths are nearly linear in the number of pieces: a line through two of them finds the one between.
        step = 8
        while high is None or high[0] - low[0] > 1:
            if high is None:
                pieces = low[0] + step
                if self.most is not None and low[0] == self.most:
                    raise ValueError(
                        f"{self.id} takes {low[1] + self.max_new_tokens} tokens with all {self.most} pieces "
                        f"that can fill it, below task.length {self.length}; lower it, or give more data"
                    )
                pieces = pieces if self.most is None else min(pieces, self.most)
            else:
                share = (room - low[1]) / (high[1] - low[1])
                pieces = min(low[0] + max(int(share * (high[0] - low[0])), 1), high[0] - 1)
            found = measured(pieces)
            if found[1] > room:
                high = found
            else:
                rate = max(found[1] - low[1], 1) / (found[0] - low[0])
                step, low = int((room - found[1]) / rate * 1.1) + 8, found
        return replace(self, prompt=self.fill(low[0]))


@dataclass(frozen=True)
class Nominal:
    """What a task takes as published, for estimates where its data is not at hand.

    Attributes:
      examples: how many there are.
      prompt_chars: of a typical prompt.
      new_tokens: that one example may decode.
      forced: whether these tokens are given, and not generated.
    """

    examples: int
    prompt_chars: int
    new_tokens: int
    forced: bool = False


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass whose fields say which examples are made; see `retro_jax.experiments.tasks.TASKS`.

    Tasks inherit from it, for `grade`.

    Attributes:
      metric: what a score means, for tables.
      data: a local file or folder with the data; None: from the Hugging Face hub, or made by code.
      local: whether `examples` reads nothing from the network.
    """

    metric: ClassVar[str]

    @property
    def local(self) -> bool:
        """Whether `examples` reads nothing from the network."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""

    def nominal(self) -> Nominal:
        """What the task takes as published."""

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The examples, at most `limit`, the same for the same fields and seed.

        Raises:
          FileNotFoundError: the data is not there.
          OSError: the data cannot be fetched.
          ValueError: the data has another form, or there is too little of it.
        """

    def grade(self, example: Example, text: str) -> list[float]:
        """A score in 0..1 for each position of the reply; called for plain `Example`s only.

        Only the final reply is graded (see `final_reply`), in every task; `text` is all that was written.
        """
        return self.grade_reply(example, final_reply(text))

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """`grade` of a reply without its reasoning, for a task to define."""


THINK, END_THINK = "<think>", "</think>"
"""Between them reasoning models write their drafts."""


def final_reply(text: str) -> str:
    """What a text says outside its reasoning: after the last `</think>`, before an unclosed `<think>`.

    So drafts are never graded, not even those of a reply that was cut off while reasoning, from which nothing
    is left. Many published harnesses search the whole text and may count a draft there.
    """
    return text.rpartition(END_THINK)[2].partition(THINK)[0]


def check_at_least(task: Task, low: int, *names: str) -> None:
    """Raises ValueError if one of these fields of a task is below `low`."""
    for name in names:
        if getattr(task, name) < low:
            raise ValueError(f"task.{name} {getattr(task, name)} is below {low}")


def check_one_of(task: Task, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if this field of a task is not one of the known values."""
    _check_known(name, getattr(task, name), known)


def check_each_of(task: Task, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if this field of a task is empty, or has an unknown value, or one twice."""
    values = getattr(task, name)
    if len(set(values)) < max(len(values), 1):
        raise ValueError(f"task.{name} {', '.join(values) or 'is empty'}: name at least one, and each once")
    for value in values:
        _check_known(name, value, known)


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        from retro_jax.models.names import nearest

        raise ValueError(
            f"task.{name} {value!r} is unknown{nearest(value, known)}; use one of {', '.join(known)}"
        )


def seeded(*parts: object) -> random.Random:
    """A random generator for a purpose named by `parts`, the same on every machine."""
    return random.Random(zlib.crc32(repr(parts).encode()))


def describe(task: Task) -> str:
    """The task's name and the fields that are not at their defaults, in one line."""
    changed = [
        f"{field.name} {getattr(task, field.name)}"
        for field in fields(task)
        if field.name != "data" and getattr(task, field.name) != field.default
    ]
    return " ".join([type(task).__name__.lower(), f"({', '.join(changed)})" if changed else ""]).strip()
