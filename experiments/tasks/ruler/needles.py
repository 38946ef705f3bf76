"""Needles: sentences that give a key a value, in a text of another kind or among others of their own."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from retro_jax.experiments.tasks.base import seeded
from retro_jax.experiments.tasks.ruler import material
from retro_jax.experiments.tasks.ruler.material import Made, distinct

DEPTHS = 40
"""Needles in a text lie at different ones of so many depths, from its beginning to its end."""
SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"')


def word(rng: random.Random) -> str:
    """A key of two words."""
    return rng.choice(material.PAIRS)


@dataclass(frozen=True)
class Needles:
    """What tells the sub-tasks apart.

    Attributes:
      among: what the needles lie in: "noise" (one passage again and again), "essay" (a text) or "needles"
        (others, which are not asked for).
      keys: that lie there.
      values: of each key.
      queries: keys that are asked for.
      key: makes one.
      value: makes one.
      noun: what values are called.
    """

    among: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: Callable[[random.Random], str] = word
    value: Callable[[random.Random], str] = material.number
    noun: str = "number"

    def __call__(self, seed: str, length: int, essay: tuple[str, ...]) -> Made:
        """What is hidden and asked.

        Args:
          seed: of the example.
          length: of the example; it does not matter.
          essay: its words.
        """
        rng = seeded("ruler", seed)
        keys = distinct(self.key, rng, self.keys)
        told = {key: distinct(self.value, rng, self.values) for key in keys}
        needles = [self.sentence(key, value) for key, values in told.items() for value in values]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        several = self.queries * self.values > 1
        what = f"secret {self.noun}{'s' * several} of {material.joined(asked)}"
        haystack = Haystack(
            needles=tuple(needles),
            depths=tuple(sorted(rng.sample(range(DEPTHS), len(needles)))),
            head=f"The text below tells secret {self.noun}s. Keep them in mind, a question follows it.",
            question=f"{'What are all' if several else 'What is'} the {what} that the text above tells?",
            pieces={"noise": tuple(material.NOISE.split()), "essay": essay}.get(self.among, ()),
            others=self if self.among == "needles" else None,
            seed=seed,
        )
        answers = tuple(value for key in asked for value in told[key])
        return Made(answers, f"The {what} {'are' if several else 'is'}", haystack)

    def sentence(self, key: str, value: str) -> str:
        """A needle."""
        return f"The secret {self.noun} of {key} is {value}."


@dataclass(frozen=True)
class Haystack:
    """A prompt with needles, by the number of pieces between them.

    Attributes:
      needles: in the order of the text.
      depths: of each of them, in 0..DEPTHS - 1; it lies between the sentences nearest to there.
      head: what stands before the text.
      question: what stands behind it.
      pieces: words, taken from the first on, and again where they are too few.
      others: what makes pieces that are needles themselves.
      seed: of these.
    """

    needles: tuple[str, ...]
    depths: tuple[int, ...]
    head: str
    question: str
    pieces: tuple[str, ...]
    others: Needles | None
    seed: str

    def __call__(self, count: int) -> str:
        """The prompt with `count` pieces.

        Raises:
          ValueError: there are fewer different keys than pieces.
        """
        if self.others:
            if self.others.key is word and count > (most := len(material.PAIRS) - len(self.needles)):
                raise ValueError(
                    f"niah_multikey_2 has words for {most} needles beside its own, fewer than task.length "
                    "has room for; lower it, or leave niah_multikey_2 out of --task.subtasks"
                )
            keys = distinct(self.others.key, seeded("ruler", self.seed, "keys"), count, self.needles)
            values = seeded("ruler", self.seed, "values")
            text = [self.others.sentence(key, self.others.value(values)) for key in keys]
        else:
            rounds = -(-count // len(self.pieces))
            text = list((self.pieces * rounds)[:count])
        ends = [0, *(place for place, piece in enumerate(text, 1) if piece.endswith(SENTENCE_ENDS))]
        for needle, depth in zip(reversed(self.needles), reversed(self.depths), strict=True):
            text.insert(ends[round((len(ends) - 1) * depth / (DEPTHS - 1))], needle)
        return f"{self.head}\n\n{' '.join(text)}\n\n{self.question}\n"
