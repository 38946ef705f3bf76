"""Needles in a text: sentences with codes hidden at random places of a book, then asked for in one reply.

After the needle-in-a-haystack tests, with many needles and one reply for all of them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.io.text import read_text
from retro_jax.experiments.tasks import codes
from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least, seeded
from retro_jax.experiments.tasks.sources import find

TEXT = Path(__file__).resolve().parent.parent / "texts" / "portrait_of_a_lady.txt"
"""The first chapters of a novel in the public domain."""


@dataclass(frozen=True)
class Needles(Task):
    """Codes hidden in a text, then asked for in one generation; accuracy by answer position."""

    metric: ClassVar[str] = "exact match"
    local: ClassVar[bool] = True

    data: Path | None = None
    """A UTF-8 text file, or a folder of .txt files; None: a novel's beginning, in the program."""
    words: int = 1200
    """Words of the text in each example; about 1.35 tokens each."""
    needles: int = 8
    """Sentences hidden, all of which are asked for."""
    count: int = 20
    """Examples."""
    forced: bool = True
    """Give the right answers as the reply and look whether each was the most likely one; else generate."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_at_least(self, 1, "words", "needles", "count")

    def nominal(self) -> Nominal:
        """What the task takes."""
        return Nominal(self.count, 6 * self.words, codes.TOKENS_PER_ANSWER * self.needles)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """Pieces of the texts by the seed, and in each the keys asked for in another order than hidden."""
        texts = [read_text(path) for path in (find(self.data, ["*.txt"]) if self.data else [TEXT])]
        found = []
        for index in range(self.count)[:limit]:
            rng = seeded("needles", seed, index)
            told = codes.make_codes(rng, self.needles)
            sentences = self._piece(rng, texts[index % len(texts)])
            for pair in told:
                sentences.insert(rng.randrange(1, len(sentences) + 1), codes.sentence(*pair))
            asked = rng.sample(told, len(told))
            found.append(codes.ask(f"needles-{index:04}", " ".join(sentences), asked, self.forced))
        return found

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 or 0 for each question."""
        return codes.grade(example, reply)

    def _piece(self, rng, text: str) -> list[str]:
        """Sentences in a row of about `words` words, from a random place."""
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        lengths = [len(sentence.split()) for sentence in sentences]
        total = sum(lengths)
        if total < self.words:
            raise ValueError(
                f"a text has {total} words, fewer than task.words {self.words}; pass a longer one with "
                "--task.data"
            )
        skipped, first = rng.randrange(total - self.words + 1), 0
        while skipped >= lengths[first]:
            skipped -= lengths[first]
            first += 1
        last, words = first, 0
        while words < self.words and last < len(sentences):
            words += lengths[last]
            last += 1
        return sentences[first:last]
