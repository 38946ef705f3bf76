"""Keys with four-digit codes, told in a context and asked for after it: what `recall` and `needles` share."""

import itertools
import random
import re

from retro_jax.experiments.tasks.base import Asked, Example

COLOURS = (
    "amber black blue bronze brown copper coral cream crimson cyan ebony gold green grey indigo ivory jade "
    "lemon lilac lime mauve navy olive orange peach pink plum purple red rose ruby rust sand scarlet silver "
    "teal violet white yellow"
)
THINGS = (
    "anchor apple arrow barrel basket bell bird boat bottle bridge button candle castle chair clock cloud "
    "crown desk door drum feather flag flower forest fox garden hammer harp horse island kettle key ladder "
    "lamp lion mirror mountain needle ocean organ owl paper piano pillow planet ring river rope sail shell "
    "ship spoon star stone table tiger tower train tree violin wagon wheel window wolf"
)
WORDS = tuple(dict.fromkeys((COLOURS + " " + THINGS).split()))
PAIRS = tuple(" ".join(pair) for pair in itertools.product(COLOURS.split(), THINGS.split()))
TOKENS_PER_ANSWER = 24
"""Of "The code for the crimson lighthouse is 1234." with room to spare."""


def make_codes(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different keys, each with a code; of one word where there are enough.

    Raises:
      ValueError: there are not so many keys.
    """
    if count > len(PAIRS):
        raise ValueError(f"{count} codes were asked for, there are {len(PAIRS)} keys; ask for fewer")
    keys = rng.sample(WORDS if count <= len(WORDS) else PAIRS, count)
    return [(key, f"{rng.randrange(10_000):04}") for key in keys]


def cue(key: str) -> str:
    """What stands before a code."""
    return f"The code for the {key} is"


def sentence(key: str, code: str) -> str:
    """A key and its code."""
    return f"{cue(key)} {code}."


def ask(name: str, context: str, asked: list[tuple[str, str]], forced: bool) -> Example:
    """The context, then all questions in one reply: given (`forced`), or to be generated.

    Args:
      name: the example's id.
      context: which tells the codes.
      asked: keys and codes, in the order of the questions.
      forced: whether cues and codes are given and only looked at.
    """
    codes = tuple(code for _, code in asked)
    if forced:
        cues = [("\n\n" if i == 0 else ".\n") + cue(key) for i, (key, _) in enumerate(asked)]
        return Asked(id=name, prompt=context, answers=tuple(f" {code}" for code in codes), cues=tuple(cues))
    keys = ", ".join(f"the {key}" for key, _ in asked)
    return Example(
        id=name,
        prompt=f"{context}\n\nNow repeat the codes for these, one a line, in this order: {keys}.\n\n",
        answers=tuple(sentence(key, code) for key, code in asked),
        max_new_tokens=TOKENS_PER_ANSWER * len(asked),
        reply=cue(asked[0][0]),
    )


def grade(example: Example, text: str) -> list[float]:
    """1 where the first code that the reply gives for a key is right, in the order of the questions."""
    scores = []
    for answer in example.answers:
        before, code = answer.removesuffix(".").rsplit(" ", 1)
        found = re.search(rf"{re.escape(before)}[\s:*_`\"'$]*(\d+)", example.reply + text)
        scores.append(float(found is not None and found[1] == code))
    return scores
