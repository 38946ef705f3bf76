r"""AIME 2024 (American Invitational Mathematics Examination): 30 problems with whole answers to 999.

Data: .jsonl with `problem` and `answer`, or from the hub HuggingFaceH4/aime_2024 (no licence
stated; the problems are the Mathematical Association of America's). There is no official harness; those in
use take the last \boxed{} of all that was written, here it is that of the reply after the reasoning.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least
from retro_jax.experiments.tasks.extraction import number
from retro_jax.experiments.tasks.sources import fetch, find, records

ASK = "Reason step by step and put the final answer into \\boxed{}."


@dataclass(frozen=True)
class AIME24(Task):
    r"""AIME 2024; pass@1 is the mean over several sampled replies."""

    metric: ClassVar[str] = "pass@1"

    data: Path | None = None
    """A .jsonl file, or a folder with one; None: from the hub."""
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
        return Nominal(30, 700, self.max_new_tokens)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The problems, in the order of the file."""
        paths = (
            find(self.data, ["test*.jsonl", "*.jsonl", "*.parquet"])
            if self.data
            else fetch("HuggingFaceH4/aime_2024", ["data/train-00000-of-00001.parquet"])
        )
        found = [record for path in paths for record in records(path, ("problem", "answer"))]
        for record in found:
            if not str(record["answer"]).strip().isdecimal():
                raise ValueError(
                    f"{paths[0]}: the answer {record['answer']!r} is no whole number; is this AIME?"
                )
        return [
            Example(
                id=f"aime24-{record.get('id', index)}",
                prompt=f"{record['problem']}\n\n{ASK}",
                answers=(str(int(record["answer"])),),
                max_new_tokens=self.max_new_tokens,
                chat=True,
            )
            for index, record in enumerate(found)
        ][:limit]

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 or 0."""
        return [float(number(reply) == example.answers[0])]
