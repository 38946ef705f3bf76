"""The search for a threshold admits as many pages as the budget, whatever their scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selection.gpu.threshold import chosen, find_threshold

PAGES = 256


@jax.jit
@jax.vmap
def admitted(scores, pages, budget, forced):
    page = jnp.arange(PAGES)

    def scan(step, *initial):
        return step([jnp.full(PAGES, value) for value in initial], scores, page)

    high, ties = find_threshold(scan, pages, budget, forced)
    return chosen(scores, page, high, ties) & (page < pages)


def nearly_equal(rng, size):
    """Scores of which the last digits differ, if any do."""
    return rng.choice([-1e3, 1e-3, 0.5, 7.0]) * (1 + rng.normal(size=size) * 10.0 ** -rng.integers(3, 9))


SCORES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "nearly equal": nearly_equal,
    "two values, nearly equal": lambda rng, size: rng.choice([5, 5 + 10.0 ** -rng.integers(3, 8)], size),
    "few values": lambda rng, size: np.round(rng.normal(size=size) * 2),
    "near zero": lambda rng, size: rng.normal(size=size) * 10.0 ** -rng.integers(20, 36),
    "far apart": lambda rng, size: np.sinh(rng.normal(size=size) * 9),
    "as large as they get": lambda rng, size: rng.choice([-1e30, -1.0, 1.0, 1e30], size),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_budgets_pages_are_admitted(scores):
    rng = np.random.default_rng(0)
    cases = []
    for most in [3, 4, 20, PAGES] * 48:
        pages = rng.integers(1, most + 1)
        values = np.full(PAGES, -np.inf, np.float32)
        values[:pages] = scores(rng, pages)
        values[[0, pages - 1]] = np.inf
        forced = len({0, pages - 1})
        budget = rng.choice([pages, rng.integers(forced, pages + 1)])
        cases.append((values, pages, budget, forced))
    values, *numbers = (np.array(column) for column in zip(*cases, strict=True))
    pages, budgets, forced = (np.asarray(column, np.int32) for column in numbers)
    found = np.asarray(admitted(values, pages, budgets, forced))
    np.testing.assert_array_equal(found.sum(axis=1), budgets)
    for admits, score, count in zip(found, values, pages, strict=True):
        score, admits = score[:count], admits[:count]
        assert score[admits].min() >= score[~admits].max(initial=-np.inf)
