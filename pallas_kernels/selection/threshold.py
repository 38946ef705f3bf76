"""The search for the score that admits as many pages as the budget, for a warpgroup that holds all scores."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Scan = Callable[..., Sequence[Array]]
"""scan(step, *initial): folds `step(carry, scores, pages)` over all pages, elementwise over a chunk."""


def chosen(score: Array, page: Array, high: Float[Array, ""], ties: Int[Array, ""]) -> Bool[Array, "..."]:
    """Whether pages belong to the set that `find_threshold` describes."""
    return (score > high) | ((score == high) & (page < ties))


def count(scan: Scan, function: Callable[[Array, Array], Bool[Array, "..."]]) -> Int[Array, ""]:
    """The number of pages for which `function(scores, pages)` holds."""
    (total,) = scan(lambda carry, *args: [carry[0] + function(*args).astype(jnp.int32)], jnp.int32(0))
    return jnp.sum(total)


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
    lowest, highest = scan(
        lambda carry, score, _: [
            jnp.minimum(carry[0], jnp.where(score == -jnp.inf, jnp.inf, score)),
            jnp.maximum(carry[1], jnp.where(score == jnp.inf, -jnp.inf, score)),
        ],
        jnp.float32(jnp.inf),
        jnp.float32(-jnp.inf),
    )
    high, above = _narrow(scan, jnp.min(lowest), jnp.max(highest), pages, budget, forced)

    # Of the pages that score just `high`, the first ones fill the budget.
    def halve(carry):
        some, enough = carry
        middle = lax.div(some + enough, jnp.int32(2))
        short = above + count(scan, lambda score, page: (score == high) & (page < middle)) < budget
        return jnp.where(short, middle, some), jnp.where(short, enough, middle)

    ties = jnp.where(above >= budget, 0, pages)
    _, ties = lax.while_loop(lambda carry: carry[1] - carry[0] > 1, halve, (jnp.int32(0), ties))
    return high, ties


def _narrow(scan, lowest, highest, pages, budget, forced):
    """The score `high` above which lie no more pages than the budget, and how many do.

    Either exactly the budget's pages do, or those that score just `high` would be too many. Scores are spread
    much like normal ones, whose odds of lying above a value have a logarithm close to linear in it: that
    guides the guesses, and every third one is the middle, for scores that are spread otherwise.
    """

    def log_odds(above):
        above = above.astype(jnp.float32)
        return jnp.log2(above + 0.5) - jnp.log2(pages.astype(jnp.float32) - above + 0.5)

    wanted = log_odds(budget)

    def between(low, high, odds_low, odds_high, step):
        # Powers of two in place of a division, which takes longer.
        share = jnp.exp2(jnp.log2(odds_low - wanted) - jnp.log2(odds_low - odds_high))
        guess = low + (high - low) * jnp.where(lax.rem(step, jnp.int32(3)) == 2, 0.5, share)
        return jnp.where((guess > low) & (guess < high), guess, low + (high - low) * 0.5)

    def narrow(carry):
        low, high, odds_low, odds_high, above_high, step, guess = carry
        above = count(scan, lambda score, _: score > guess)
        fits, odds = above <= budget, log_odds(above)
        low, odds_low = jnp.where(fits, low, guess), jnp.where(fits, odds_low, odds)
        high, odds_high = jnp.where(fits, guess, high), jnp.where(fits, odds, odds_high)
        above_high = jnp.where(fits, above, above_high)
        guess = between(low, high, odds_low, odds_high, step + 1)
        return low, high, odds_low, odds_high, above_high, step + 1, guess

    def undecided(carry):
        low, high, *_, above, _, guess = carry
        return (above != budget) & (guess > low) & (guess < high)

    low = lowest - (highest - lowest) * 0.01  # below every page
    odds = log_odds(pages), log_odds(forced)
    guess = between(low, highest, *odds, jnp.int32(0))
    carry = (low, highest, *odds, forced, jnp.int32(0), guess)
    _, high, _, _, above, _, _ = lax.while_loop(undecided, narrow, carry)
    return high, above
