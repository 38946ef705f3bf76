"""What prompts begin with in common, to be read once for all of them."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

LEAST = 64
"""Tokens. Fewer are read sooner with each prompt than by a program that must be compiled for them."""


def common_tokens(one: Int[np.ndarray, " T"], other: Int[np.ndarray, " U"]) -> int:
    """How many first tokens two prompts have in common."""
    both = min(len(one), len(other))
    differing = one[:both] != other[:both]
    return int(np.argmax(differing)) if differing.any() else both


def runs(prompts: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Parts prompts, in their order, into runs that begin alike.

    What all prompts of a run begin with is at least `LEAST` tokens, and leaves every one a token to read. A
    run ends where two neighbours have less than half in common of what one of them has with its other one: a
    question whose examples are others shares no more than its instructions with those before it.

    Yields:
      How many prompts a run has, and how many first tokens they share; 0 for prompts beside which none
      begins alike.
    """
    common = [
        min(common_tokens(one, other), len(one) - 1, len(other) - 1)
        for one, other in itertools.pairwise(prompts)
    ]
    beside = [0, *common, 0]
    ends = [
        end
        for end, both in enumerate(common, 1)
        if both < max(LEAST, beside[end - 1] / 2, beside[end + 1] / 2)
    ]
    parts = [
        (stop - start, min(common[start : stop - 1], default=0))
        for start, stop in itertools.pairwise([0, *ends, len(prompts)])
    ]
    for alike, some in itertools.groupby(parts, lambda part: part[1] > 0):
        if alike:
            yield from some
        else:
            yield sum(count for count, _ in some), 0
