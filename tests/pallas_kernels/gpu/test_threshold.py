"""As many pages are selected as the budget has, whatever their scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import STATISTICS
from pallas_kernels.compaction import chosen
from pallas_kernels.selection.gpu import kernels as selection
from pallas_kernels.selection.gpu.threshold import find_threshold

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


@pytest.mark.parametrize(("kind", "group_reduce"), [("mean_key", "mean"), ("mean_key_int8", "mass")])
def test_scores_that_are_no_numbers_leave_whole_selections(kind, group_reduce):
    """What a sequence's NaN or infinities select has no meaning, but lies in the cache."""
    keys = np.random.default_rng(0).standard_normal((2, 1, 72, 1, 64))
    keys[0, :, 9:60:5], keys[1, :, 9:60:5] = np.nan, np.inf
    inputs = (
        jnp.ones((2, 1, 64), jnp.bfloat16),
        STATISTICS[kind].keep(jnp.asarray(keys, jnp.bfloat16)),
        jnp.asarray([70 * 16, 72 * 16 - 1], jnp.int32),
        jnp.asarray([65, 50], jnp.int32),
    )
    arguments = {
        "page_size": 16,
        "capacity": 70,
        "score": "mean_key",
        "group_reduce": group_reduce,
        "sink_pages": 1,
    }
    select = functools.partial(selection.select_pages, interpret=plgpu.InterpretGPUParams(), **arguments)
    ids, counts = jax.jit(select)(*inputs)
    for row, count, pages in zip(ids[:, 0], counts[:, 0], (71, 72), strict=True):
        chosen = row[:count].tolist()
        assert len(set(chosen)) == count
        assert {0, pages - 1} <= set(chosen) <= set(range(pages))
