"""Key-value recall, made by code: a list of codes, then many of them asked for in one reply.

A densely read prompt makes this a test of which pages are selected. Small models can do it (SmolLM2-135M is
reliable up to some 200 pairs), and a wrong code in the reply is there for later answers to copy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks import codes
from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least, seeded

CHARS_PER_PAIR = 42


@dataclass(frozen=True)
class Recall(Task):
    """A list of keys with codes, then questions about them in one generation; accuracy by answer position."""

    metric: ClassVar[str] = "exact match"
    data: ClassVar[Path | None] = None
    local: ClassVar[bool] = True

    pairs: int = 128
    """Keys in the list; about 14 tokens each."""
    questions: int = 30
    """Keys asked for."""
    count: int = 20
    """Examples."""
    forced: bool = True
    """Give the right answers as the reply and look whether each was the most likely one; else generate."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_at_least(self, 1, "pairs", "questions", "count")
        if self.questions > self.pairs:
            raise ValueError(f"task.questions {self.questions} exceed the task.pairs {self.pairs}")

    def nominal(self) -> Nominal:
        """What the task takes."""
        return Nominal(self.count, CHARS_PER_PAIR * self.pairs, codes.TOKENS_PER_ANSWER * self.questions)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """Lists by the seed, and in each the keys asked for in another order."""
        found = []
        for index in range(self.count)[:limit]:
            rng = seeded("recall", seed, index)
            told = codes.make_codes(rng, self.pairs)
            context = "\n".join(codes.sentence(*pair) for pair in told)
            asked = rng.sample(told, self.questions)
            found.append(codes.ask(f"recall-{index:04}", context, asked, self.forced))
        return found

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 or 0 for each question."""
        return codes.grade(example, reply)
