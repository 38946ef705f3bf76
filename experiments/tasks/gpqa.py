r"""GPQA-Diamond (Rein et al., arXiv 2311.12022; CC BY 4.0): 198 graduate-level questions with four choices.

Data: gpqa_diamond.csv, from the hub Idavidrein/gpqa, where one must accept its terms (do not publish it).
Harnesses differ in what they ask for ("Answer: X", "The correct answer is (X)") and read that alone; here
\boxed{X} is asked for and any of these is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least, seeded
from retro_jax.experiments.tasks.extraction import choice
from retro_jax.experiments.tasks.sources import fetch, find, records

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
LETTERS = "ABCD"


@dataclass(frozen=True)
class GPQA(Task):
    """GPQA-Diamond, the choices in a seeded order; pass@1 is the mean over several sampled replies."""

    metric: ClassVar[str] = "pass@1"

    data: Path | None = None
    """gpqa_diamond.csv, or a folder with it; None: from the hub."""
    max_new_tokens: int = 32768
    """The reply's limit, reasoning included."""

    @property
    def local(self) -> bool:
        """Whether `examples` reads nothing from the network."""
        return self.data is not None

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_at_least(self, 1, "max_new_tokens")

    def nominal(self) -> Nominal:
        """What the task takes as published."""
        return Nominal(198, 900, self.max_new_tokens)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The questions in the order of the file, each with its choices in an order of its own."""
        name = "gpqa_diamond.csv"
        (path,) = find(self.data, [name]) if self.data else fetch("Idavidrein/gpqa", [name])
        found = []
        for index, record in enumerate(records(path, ("Question", *CHOICES))[:limit]):
            order = seeded("gpqa", seed, index).sample(CHOICES, len(CHOICES))
            lines = [
                f"({letter}) {record[name].strip()}" for letter, name in zip(LETTERS, order, strict=True)
            ]
            ask = "Reason step by step, then end with \\boxed{X}, where X is the letter of the right choice."
            found.append(
                Example(
                    id=f"gpqa-{record.get('Record ID') or index}",
                    prompt="\n".join([record["Question"].strip(), *lines, "", ask]),
                    answers=(LETTERS[order.index(CHOICES[0])],),
                    max_new_tokens=self.max_new_tokens,
                    chat=True,
                )
            )
        return found

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 or 0."""
        return [float(choice(reply, LETTERS) == example.answers[0])]
