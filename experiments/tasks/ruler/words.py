"""Aggregation: which words of a list, or of a coded text, come most often."""

import functools
import math
import string
from dataclasses import dataclass

from retro_jax.experiments.tasks.base import seeded
from retro_jax.experiments.tasks.ruler.material import PAIRS, Made, distinct

COMMON = 10
SHORT = 4096
"""Below this length common words come 6 times and others once, from it on 30 and 3 times."""
FREQUENT = 3
TOKENS_PER_CODED_WORD = 50
"""Different words of a coded text: its length over so many."""


def common_words(seed: str, length: int, essay: tuple[str, ...]) -> Made:
    """Ten words of a numbered list come more often than others; see `Needles.__call__` for the arguments."""
    short = length < SHORT
    shown = WordList(0, *((3, 1) if short else (10, 3)), seed)
    answered = f"{shown(10 if short else 30)}{shown.reply} {', '.join(shown.common)}.\n\n"
    asked = WordList(50, *((6, 1) if short else (30, 3)), seed, answered)
    return Made(asked.common, asked.reply, asked, most=len(PAIRS) - 50 - COMMON)


@dataclass(frozen=True)
class WordList:
    """A prompt with a list of words, by the number of different words that are not common.

    Attributes:
      start: its words are those from here on of all that there are, shuffled; first the common ones.
      often: how many times a common word is there.
      seldom: how many times another is.
      seed: of the order.
      before: an example that is answered.
    """

    start: int
    often: int
    seldom: int
    seed: str
    before: str = ""
    reply = f"The {COMMON} words that come most often are"

    def __call__(self, count: int) -> str:
        """The prompt with `count` words that are not common."""
        others = _shuffled(self.seed)[self.start + COMMON :][:count]
        words = [*self.common * self.often, *others * self.seldom]
        seeded("ruler", self.seed, "order").shuffle(words)
        listed = " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
        return (
            f"{self.before}Some words of the list below come more often than the others.\n\n{listed}\n\n"
            f"Which {COMMON} words come most often in the list above?\n"
        )

    @property
    def common(self) -> tuple[str, ...]:
        """The words that are asked for."""
        return _shuffled(self.seed)[self.start :][:COMMON]


@functools.lru_cache(maxsize=1)  # an example is made several times, until its length is right
def _shuffled(seed: str) -> tuple[str, ...]:
    """All words there are, in an order of the seed."""
    return tuple(seeded("ruler", seed).sample(PAIRS, len(PAIRS)))


def frequent_words(seed: str, length: int, essay: tuple[str, ...]) -> Made:
    """The three most frequent words of a coded text; see `Needles.__call__` for the arguments."""
    rng, count = seeded("ruler", seed), length // TOKENS_PER_CODED_WORD
    coded = distinct(lambda rng: "".join(rng.choices(string.ascii_lowercase, k=6)), rng, count)
    text = CodedText(tuple(coded), seed)
    # From a hundred words on no two of the most frequent come as often as each other.
    return Made(tuple(coded[:FREQUENT]), text.reply, text, least=100)


@dataclass(frozen=True)
class CodedText:
    """A prompt with a coded text, by the number of its words, dots among them.

    Words follow Zipf's law: that of rank k makes k ** -2 / zeta(2) of the text. The first rank have dots.

    Attributes:
      coded: words, the most frequent first.
      seed: of their order.
    """

    coded: tuple[str, ...]
    seed: str
    reply = f"The {FREQUENT} coded words that come most often are"

    def __call__(self, count: int) -> str:
        """The prompt with `count` words, or a few less, as each comes a whole number of times."""
        words = []
        for rank, word in enumerate(("...", *self.coded), 1):
            words += [word] * int(count * rank**-2 / (math.pi**2 / 6))
        seeded("ruler", self.seed, "order").shuffle(words)
        return (
            "In the coded text below, count how often each coded word comes. Dots are no words.\n\n"
            f"{' '.join(words)}\n\n"
            f"Which {FREQUENT} coded words come most often in the text above? Name nothing else.\n"
        )
