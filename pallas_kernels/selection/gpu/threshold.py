"""The search for the score that admits as many pages as the budget, for a warpgroup that holds all scores."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_DEVIATIONS = 0.407
"""About how many standard deviations a normal value lies from the mean for each power of two in the odds of
lying above it: ln(2) / 1.702."""

_LEAST = 2.0**-100
"""What separates two scores near zero."""

Scan = Callable[..., Sequence[Array]]
"""scan(step, *initial): folds `step(carry, scores, pages)` over all pages, elementwise over a chunk."""


def count(scan: Scan, function: Callable[[Array, Array], Bool[Array, "..."]]) -> Int[Array, ""]:
    """The number of pages for which `function(scores, pages)` holds."""
    (total,) = scan(lambda carry, *args: [carry[0] + function(*args).astype(jnp.int32)], jnp.int32(0))
    return jnp.sum(total)


def count_two(scan: Scan, first: Array, second: Array) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The numbers of pages that score above each of two values, as halves of one sum: at most 65535 each."""

    def step(carry, score, _):
        return [carry[0] + jnp.where(score > first, 1, 0) + jnp.where(score > second, 1 << 16, 0)]

    total = jnp.sum(scan(step, jnp.int32(0))[0])
    return total & 0xFFFF, lax.shift_right_logical(total, jnp.int32(16))


def find_threshold(
    scan: Scan, pages: Int[Array, ""], budget: Int[Array, ""], forced: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Describes the set of the budget's best pages, ties to the lower page.

    Args:
      scan: over scores, infinite for forced pages and -infinite for what is no page.
      pages: how many there are.
      budget: how many to choose.
      forced: how many of them score infinitely.

    Returns:
      high, ties: every page that scores above `high`, and of those that score just `high` the ones before
      page `ties`.
    """
    high, above = _narrow(scan, _spread(scan, pages - forced), pages, budget, forced)

    # Of the pages that score just `high`, the first ones fill the budget.
    def halve(carry):
        some, enough = carry
        middle = lax.div(some + enough, jnp.int32(2))
        short = above + count(scan, lambda score, page: (score == high) & (page < middle)) < budget
        return jnp.where(short, middle, some), jnp.where(short, enough, middle)

    ties = jnp.where(above >= budget, 0, pages)
    _, ties = lax.while_loop(lambda carry: carry[1] - carry[0] > 1, halve, (jnp.int32(0), ties))
    return high, ties


def _spread(scan, number):
    """The lowest, the highest, the mean and the standard deviation of the finite scores, `number` of them."""

    def step(carry, score, _):
        lowest, highest, total, squares = carry
        finite = jnp.where(jnp.abs(score) == jnp.inf, 0.0, score)
        return [
            jnp.minimum(lowest, jnp.where(score == -jnp.inf, jnp.inf, score)),
            jnp.maximum(highest, jnp.where(score == jnp.inf, -jnp.inf, score)),
            total + finite,
            squares + finite * finite,
        ]

    lowest, highest, total, squares = scan(step, *map(jnp.float32, (jnp.inf, -jnp.inf, 0, 0)))
    mean = jnp.sum(total) / number.astype(jnp.float32)
    variance = jnp.sum(squares) / number.astype(jnp.float32) - mean * mean
    return jnp.min(lowest), jnp.max(highest), mean, jnp.sqrt(jnp.maximum(variance, 0.0))


def _narrow(scan, spread, pages, budget, forced):
    """The score `high` above which lie no more pages than the budget, and how many do.

    Either exactly the budget's pages do, or those that score just `high` would be too many. Every look at the
    scores counts the pages above two guesses, which mean to enclose the threshold. Scores are spread much
    like normal ones, whose odds of lying above a value have a logarithm close to linear in it: that guides
    the guesses, and every third pair are thirds of what is left, for scores that are spread otherwise.
    """
    lowest, highest, mean, deviation = spread
    wanted = budget.astype(jnp.float32)

    def log_odds(above):
        return jnp.log2(above + 0.5) - jnp.log2(pages.astype(jnp.float32) - above + 0.5)

    def inside(low, high, guess):
        return jnp.where((guess > low) & (guess < high), guess, low + (high - low) * 0.5)

    def first_guess(above):
        above = jnp.minimum(jnp.maximum(above, 0.0), pages.astype(jnp.float32))
        return inside(low, highest, mean - deviation * (_DEVIATIONS * log_odds(above)))

    def guesses(low, high, above_low, above_high, step):
        above_low, above_high = above_low.astype(jnp.float32), above_high.astype(jnp.float32)
        left = above_low - above_high
        odds_low, odds_high = log_odds(above_low), log_odds(above_high)
        thirds = (lax.rem(step, jnp.int32(3)) == 2) | (left <= 8)

        def guess(above, third):
            above = jnp.minimum(jnp.maximum(above, above_high), above_low)
            # Powers of two in place of a division, which takes longer.
            share = jnp.exp2(jnp.log2(odds_low - log_odds(above)) - jnp.log2(odds_low - odds_high))
            return inside(low, high, low + (high - low) * jnp.where(thirds, third, share))

        margin = 0.25 * jnp.sqrt(left)
        first, second = guess(wanted + margin, 1 / 3), guess(wanted - margin, 2 / 3)
        return jnp.minimum(first, second), jnp.maximum(first, second)

    def narrow(carry):
        low, high, above_low, above_high, step, (first, second) = carry
        above_first, above_second = count_two(scan, first, second)
        for guess, above in ((first, above_first), (second, above_second)):
            low, above_low = (
                jnp.where(above > budget, guess, low),
                jnp.where(above > budget, above, above_low),
            )
        for guess, above in ((second, above_second), (first, above_first)):
            high = jnp.where(above <= budget, guess, high)
            above_high = jnp.where(above <= budget, above, above_high)
        pair = guesses(low, high, above_low, above_high, step + 1)
        return low, high, above_low, above_high, step + 1, pair

    def undecided(carry):
        low, high, _, above_high, _, (first, _) = carry
        return (above_high != budget) & (first > low) & (first < high)

    # Below every page, also where all score alike but for the last digits.
    low = lowest - jnp.maximum((highest - lowest) * 0.01, jnp.abs(lowest) * 2.0**-22 + _LEAST)
    margin = 0.5 * jnp.sqrt(pages.astype(jnp.float32))
    pair = first_guess(wanted + margin), first_guess(wanted - margin)
    carry = (low, highest, pages, forced, jnp.int32(0), pair)
    _, high, _, above, _, _ = lax.while_loop(undecided, narrow, carry)
    return high, above
