"""LongGenBench (Liu et al., arXiv 2410.04199): many short questions in one prompt, answered in one reply.

Its score is the accuracy at each question's place in the reply, so that errors that pile up along a long
generation show. Differences from the original: the wording of the prompt; MMLU's and CommonsenseQA's worked
examples end in the answer without steps, as their data has none; CommonsenseQA, which the RetroAttention
paper adds, is read from its dev split. The original takes the paragraphs that follow a colon and a line
break in their order, without looking at their numbers, and of each the last number without its sign, or the
last of the capitals A to D, and it asks again for answers that MMLU's reply lacks; here an answer belongs to
the question that its heading names, is what it states (see `extraction`), and what is missing is wrong.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least, check_one_of, seeded
from retro_jax.experiments.tasks.extraction import choice, number, sections
from retro_jax.experiments.tasks.questions import LETTERS, Question, commonsenseqa, gsm8k, mmlu

READ = {"gsm8k": gsm8k, "mmlu": mmlu, "commonsenseqa": commonsenseqa}
SPLITS = {"gsm8k": ("train", "test"), "mmlu": ("dev", "test"), "commonsenseqa": ("train", "dev")}
SIZES = {"gsm8k": 1319, "mmlu": 14042, "commonsenseqa": 1221}
"""Published numbers of questions in the split that is asked."""


@dataclass(frozen=True)
class LongGenBench(Task):
    """n questions in one prompt, answered in order in one generation; accuracy by question position."""

    metric: ClassVar[str] = "accuracy"

    source: str = "gsm8k"
    """Where the questions are from: "gsm8k", "mmlu" or "commonsenseqa"."""
    data: Path | None = None
    """A folder with the source's files (see `experiments/tasks/questions.py`); None: from the hub."""
    n: int = 30
    """Questions in one prompt; the paper has 15, 30 and 45."""
    shots: int = 8
    """Worked examples before them, from the split for training."""
    tokens_per_answer: int = 192
    """The reply's limit is n times this."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_one_of(self, "source", tuple(READ))
        check_at_least(self, 1, "n", "tokens_per_answer")
        check_at_least(self, 0, "shots")

    @property
    def local(self) -> bool:
        """Whether `examples` reads nothing from the network."""
        return self.data is not None

    def nominal(self) -> Nominal:
        """What the task takes as published."""
        return Nominal(
            SIZES[self.source] // self.n, 300 * self.n + 600 * self.shots, self.n * self.tokens_per_answer
        )

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The questions in a seeded order, n in each prompt; what is left over is not asked."""
        train, test = SPLITS[self.source]
        shots, asked = READ[self.source](self.data, train), READ[self.source](self.data, test)
        groups = self._groups(asked, seed)
        if not groups:
            raise ValueError(
                f"{self.source} has {len(asked)} questions, fewer than the task.n {self.n} of one prompt"
            )
        return [
            self._example(f"{self.source}-{self.n}-{index:04}", group, self._shots(shots, group, seed))
            for index, group in enumerate(groups[:limit])
        ]

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 or 0 for each question."""
        parts = sections(reply, len(example.answers))
        find = number if self.source == "gsm8k" else lambda part: choice(part, LETTERS[:5])
        return [float(find(part) == answer) for part, answer in zip(parts, example.answers, strict=True)]

    def _groups(self, asked: list[Question], seed: int) -> list[list[Question]]:
        """Lists of n questions; of one subject, as LongGenBench does with MMLU."""
        groups = []
        for subject in sorted({question.subject for question in asked}):
            chosen = [question for question in asked if question.subject == subject]
            seeded("longgenbench", self.source, subject, seed).shuffle(chosen)
            groups += [chosen[i : i + self.n] for i in range(0, len(chosen) - self.n + 1, self.n)]
        seeded("longgenbench groups", self.source, seed).shuffle(groups)
        return groups

    def _shots(self, shots: list[Question], group: list[Question], seed: int) -> list[Question]:
        chosen = [question for question in shots if question.subject == group[0].subject]
        if len(chosen) < self.shots and not group[0].subject:
            raise ValueError(
                f"{self.source} has {len(chosen)} questions for training, fewer than task.shots {self.shots}"
            )
        seeded("longgenbench shots", self.source, group[0].subject, seed).shuffle(chosen)
        return chosen[: self.shots]

    def _example(self, name: str, group: list[Question], shots: list[Question]) -> Example:
        head = (
            "Answer every question below, one after the other, in the order they are asked. Think each one "
            'through briefly, begin each answer with "Answer_i:" where i is the number of the question, and '
            'end it with "The answer is ...".'
        )
        parts = [head]
        if shots:
            parts += ["Here is an example.", _asked(shots)]
            parts += [f"Answer_{i}:\n{shot.solution}" for i, shot in enumerate(shots, 1)]
            parts.append(f"Now answer these {len(group)} questions in the same way.")
        parts.append(_asked(group))
        return Example(
            id=name,
            prompt="\n\n".join(parts) + "\n\n",
            answers=tuple(question.answer for question in group),
            max_new_tokens=self.n * self.tokens_per_answer,
            chat=True,
        )


def _asked(questions: list[Question]) -> str:
    return "\n\n".join(f"Question_{i}:\n{question.text}" for i, question in enumerate(questions, 1))
