"""What the sub-tasks are made of: words, numbers and noise, all by code; and what each of them gives."""

import itertools
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from retro_jax.experiments.tasks.codes import COLOURS, THINGS

QUALITIES = (
    "able ancient bare bitter blank bold brave brief bright brisk broad calm careful cheap clean clear "
    "clever close cold common crisp curious damp dark dear deep dense dim distant dry dull eager early "
    "easy empty even faint fair faithful false famous fast fierce final fine firm flat fond formal free "
    "fresh gentle glad grand grave great happy hard heavy high hollow honest humble idle keen kind large "
    "late lazy light little lively lonely long loose loud loyal lucky mild modest narrow near neat noble "
    "odd patient plain polite proud pure quick quiet rare ready rich rough round royal sad safe secret "
    "sharp short shy silent simple slow small smooth soft solid sour steady steep stiff strange strong "
    "sudden sweet swift tall tame tender thick thin tidy tiny tough true vast warm weak weary wet wide "
    "wild wise young"
)
MORE_THINGS = (
    "bench blanket brush bucket cabin camel canal cart cave cellar chest cliff coat comb cradle curtain "
    "dagger ditch dome engine fence ferry field fork gate glove goat hat hedge hill hut jar jug kite "
    "knife ladle lake lantern leaf marsh meadow mill nail nest oven path pearl pebble pond pot rabbit "
    "robe roof root saddle shelf shirt sparrow stove street tent thread tunnel valley wall well whistle "
    "wing"
)
PAIRS = tuple(
    "-".join(pair)
    for pair in itertools.product(
        dict.fromkeys((COLOURS + " " + QUALITIES).split()),
        dict.fromkeys((THINGS + " " + MORE_THINGS).split()),
    )
)
"""What keys and lists are made of, more than 128k tokens have room for; none is a part of another."""
NOISE = (
    "The kettle is warm. The street is empty. A boat lies by the bridge. Nobody asks why. So the day goes on."
)


@dataclass(frozen=True)
class Made:
    """What a sub-task asks; the attributes are those of `Filled`."""

    answers: tuple[str, ...]
    reply: str
    fill: Callable[[int], str]
    least: int = 0
    most: int | None = None


def number(rng: random.Random) -> str:
    """Seven digits, the first of them no zero."""
    return str(rng.randrange(10**6, 10**7))


def identifier(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def joined(words: list[str]) -> str:
    """Words as in a sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def distinct(
    make: Callable[[random.Random], str], rng: random.Random, count: int, without: tuple[str, ...] = ()
) -> list[str]:
    """So many different ones, none of which is a word of the texts `without`."""
    found: dict[str, None] = {}
    while len(found) < count:
        new = make(rng)
        if not any(f" {new} " in text for text in without):
            found[new] = None
    return list(found)
