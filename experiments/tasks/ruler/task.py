"""The task RULER: its sub-tasks, and how they are graded."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.io.folders import digest
from retro_jax.experiments.io.text import read_text
from retro_jax.experiments.tasks.base import Filled, Nominal, Task, check_at_least, check_each_of, seeded
from retro_jax.experiments.tasks.needles import TEXT
from retro_jax.experiments.tasks.ruler import documents, variables, words
from retro_jax.experiments.tasks.ruler.documents import DataSet
from retro_jax.experiments.tasks.ruler.material import Made, identifier
from retro_jax.experiments.tasks.ruler.needles import Needles
from retro_jax.experiments.tasks.sources import SUFFIXES, find

CHARS_PER_TOKEN = 3
"""As where what a run takes is planned without a tokenizer."""


@dataclass(frozen=True)
class SubTask:
    """A sub-task.

    Attributes:
      max_new_tokens: the reply's limit.
      make: (seed, length, words of the essay) -> what is asked; None where data is read.
      reads: the data set whose questions it asks.
      essay: whether it lies in the essay.
    """

    max_new_tokens: int
    make: Callable[[str, int, tuple[str, ...]], Made] | None = None
    reads: DataSet | None = None
    essay: bool = False


def _needles(among: str, **fields) -> SubTask:
    return SubTask(128, Needles(among, **fields), essay=among == "essay")


_IDENTIFIERS = {"value": identifier, "noun": "identifier"}

SUBTASKS: Mapping[str, SubTask] = {
    "niah_single_1": _needles("noise"),
    "niah_single_2": _needles("essay"),
    "niah_single_3": _needles("essay", **_IDENTIFIERS),
    "niah_multikey_1": _needles("essay", keys=4),
    "niah_multikey_2": _needles("needles"),
    "niah_multikey_3": _needles("needles", key=identifier, **_IDENTIFIERS),
    "niah_multivalue": _needles("essay", values=4),
    "niah_multiquery": _needles("essay", keys=4, queries=4),
    "vt": SubTask(30, variables.chain),
    "cwe": SubTask(120, words.common_words),
    "fwe": SubTask(50, words.frequent_words),
    "qa_1": SubTask(32, reads=documents.SQUAD),
    "qa_2": SubTask(32, reads=documents.HOTPOTQA),
}
"""By RULER's own names."""
MADE_BY_CODE = tuple(name for name, subtask in SUBTASKS.items() if not subtask.reads)
"""Those that need no data."""


@dataclass(frozen=True)
class RULER(Task):
    """RULER: needles, variable tracking, aggregation, questions; the share of right strings in the reply."""

    metric: ClassVar[str] = "share found"

    subtasks: tuple[str, ...] = tuple(SUBTASKS)
    """Which of niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery (needles), vt
    (variable tracking), cwe, fwe (common and frequent words), qa_1 and qa_2 (questions, which need data)."""
    length: int = 4096
    """Tokens of prompt and reply, by the model's tokenizer: a prompt is filled up as far as there is room."""
    count: int = 500
    """Examples of each sub-task."""
    data: Path | None = None
    """A folder with what needles lie in, .txt files, and with SQuAD's dev-v2.0.json and HotpotQA's
    hotpot_dev_distractor_v1.json for questions, or one such file. None, or no .txt there: a novel's
    beginning, in the program. A text that is shorter than a prompt is repeated."""

    @property
    def local(self) -> bool:
        """Whether nothing is missing: questions need data."""
        return self.data is not None or not any(SUBTASKS[name].reads for name in self.subtasks)

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_each_of(self, "subtasks", tuple(SUBTASKS))
        check_at_least(self, 1, "count")
        check_at_least(self, 512, "length")

    def nominal(self) -> Nominal:
        """What the task takes."""
        new = max(SUBTASKS[name].max_new_tokens for name in self.subtasks)
        return Nominal(self.count * len(self.subtasks), CHARS_PER_TOKEN * (self.length - new), new)

    def examples(self, seed: int, limit: int | None) -> list[Filled]:
        """The sub-tasks by turns, each example by the seed and its number; questions in a random order."""
        essay = self._essay() if any(SUBTASKS[name].essay for name in self.subtasks) else ()
        makers = {name: self._maker(name, essay, seed) for name in self.subtasks}
        turns = itertools.product(range(self.count), self.subtasks)
        return [makers[name](index) for index, name in itertools.islice(turns, limit)]

    def grade_reply(self, example: Filled, reply: str) -> list[float]:
        """The share of the right strings that the reply has, in any case of letters; 1 or 0 for questions."""
        hits = [answer.casefold() in reply.casefold() for answer in example.answers]
        return [float(any(hits)) if SUBTASKS[example.part].reads else sum(hits) / len(hits)]

    def _maker(self, name: str, essay: tuple[str, ...], seed: int) -> Callable[[int], Filled]:
        """What makes the examples of a sub-task, by their numbers."""
        subtask = SUBTASKS[name]
        if subtask.reads:
            library = documents.read(subtask.reads, self.data, name)
            questions = len(library.asking)
            if questions < self.count:
                raise ValueError(
                    f"{subtask.reads.file} has {questions} questions, fewer than task.count {self.count}; "
                    "lower it"
                )
            chosen, data = seeded("ruler", name, seed).sample(range(questions), self.count), library.digest
        else:
            library, data = None, digest(list(essay)) if subtask.essay else ""

        def example(index: int) -> Filled:
            own = f"{name} {index} {seed}"
            if library:
                made = documents.question(library, chosen[index], own)
            else:
                made = subtask.make(own, self.length, essay)
            return Filled(
                id=f"{name}-{index:04}",
                prompt=made.fill(made.least),
                answers=made.answers,
                max_new_tokens=subtask.max_new_tokens,
                chat=True,
                reply=made.reply,
                part=name,
                length=self.length,
                fill=made.fill,
                least=made.least,
                most=made.most,
                data=data,
            )

        return example

    def _essay(self) -> tuple[str, ...]:
        """The words of the texts that needles lie in."""
        texts = [TEXT]
        if self.data and self.data.is_dir():
            texts = sorted(self.data.glob("*.txt")) or texts
        elif self.data and self.data.suffix not in SUFFIXES:
            texts = find(self.data, [])
        return tuple(" ".join(map(read_text, texts)).split())
