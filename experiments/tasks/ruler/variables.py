"""Variable tracking: a value goes from variable to variable, in statements among noise."""

import string
from dataclasses import dataclass

from retro_jax.experiments.tasks.base import seeded
from retro_jax.experiments.tasks.ruler.material import NOISE, Made, distinct

HOPS = 4
SENTENCES = NOISE.replace(". ", ".\n").split("\n")
PLACES = 1000
SHOWN = 10
"""Sentences of noise in the example that is shown with its answer."""


def chain(seed: str, length: int, essay: tuple[str, ...]) -> Made:
    """One chain: the names of all variables that have its value; see `Needles.__call__` for the arguments."""
    shown = _chain(f"{seed}-shown", 3)
    answered = f"{shown(SHOWN)}{shown.reply} {', '.join(shown.names)}.\n\n"
    asked = _chain(seed, 5, answered)
    return Made(asked.names, asked.reply, asked)


def _chain(seed: str, letters: int, before: str = "") -> "Chain":
    rng = seeded("ruler", seed)
    names = distinct(lambda rng: "".join(rng.choices(string.ascii_uppercase, k=letters)), rng, HOPS + 1)
    places = sorted(rng.sample(range(PLACES), HOPS + 1))
    return Chain(tuple(names), rng.randrange(10_000, 100_000), tuple(places), before)


@dataclass(frozen=True)
class Chain:
    """A prompt with a chain of statements, by the number of sentences between them.

    Attributes:
      names: of the variables, in the order of the chain.
      value: that they all have.
      places: of the statements in the text, of 0..PLACES - 1.
      before: an example that is answered.
    """

    names: tuple[str, ...]
    value: int
    places: tuple[int, ...]
    before: str = ""

    def __call__(self, count: int) -> str:
        """The prompt with `count` sentences."""
        text = (SENTENCES * -(-count // len(SENTENCES)))[:count]
        given = [str(self.value), *self.names]
        statements = [f"VAR {name} = {what}." for name, what in zip(self.names, given, strict=False)]
        for statement, place in zip(reversed(statements), reversed(self.places), strict=True):
            text.insert(place * (count + 1) // PLACES, statement)
        return (
            f"{self.before}In the text below, follow how a value goes from variable to variable.\n\n"
            f"{' '.join(text)}\n\nWhich variables have the value {self.value} at the end of the text above?\n"
        )

    @property
    def reply(self) -> str:
        """How the answer begins."""
        return f"There are {len(self.names)} variables with the value {self.value}:"
