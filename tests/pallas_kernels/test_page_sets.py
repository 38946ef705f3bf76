"""The comparison of selections: what rounding explains is the same choice, and nothing else is."""

import numpy as np
import pytest

from pallas_kernels import GROUP_REDUCE, Statistics
from tests.pallas_kernels.page_sets import ROUNDING, distance, largest_distance, scores_and_sizes

SCORES = np.array([9.0, 5.0, 3.0 + 4e-7, 3.0, 3.0 + 1e-3, -4.0, np.nan])
SIZES = np.full(7, 10.0)


@pytest.mark.parametrize(
    ("got", "same"),
    [
        ([1, 0, 4, 2], True),
        ([0, 1, 3, 4], True),  # page 3 for page 2: 4e-8 of the sizes apart
        ([0, 1, 2, 3], False),  # page 3 for page 4: 1e-4
        ([0, 2, 3, 4], False),  # page 3 for page 1, though only 2 and 3 may be exchanged
        ([0, 1, 4, 5], False),
        ([0, 1, 4, 6], False),  # without a score
        ([0, 1, 4, 99], False),  # no page
        ([1, 2, 3, 4], False),  # without the forced page
        ([0, 1, 4], False),
        ([0, 1, 4, 4], False),
        ([0, 1, 2, 4, 4], False),
    ],
)
def test_only_pages_within_rounding_of_the_last_one_may_be_exchanged(got, same):
    assert (distance(got, [0, 1, 2, 4], SCORES, SIZES, forced={0}) <= ROUNDING) == same


def test_only_equal_sets_have_no_distance():
    assert distance([2, 1], [1, 2], np.ones(4), SIZES) == 0
    assert 0 < distance([2, 1], [1, 3], np.ones(4), SIZES) <= ROUNDING  # a tie


def test_a_forced_page_is_not_the_last_one_whatever_it_scores():
    assert distance([5, 0, 1, 3], [5, 0, 1, 2], SCORES, SIZES, forced={5}) <= ROUNDING
    assert distance([5, 0, 1, 3], [5, 0, 1, 2], SCORES, SIZES) > ROUNDING


@pytest.mark.parametrize("group_reduce", GROUP_REDUCE)
def test_a_wrong_page_of_any_head_is_found(group_reduce):
    rng = np.random.default_rng(0)
    B, K, P, D, S = 2, 2, 12, 16, 4
    q, values = rng.standard_normal((B, K * 3, D)), rng.standard_normal((B, K, P, 1, D))
    statistics = Statistics(values, kind="mean_key")
    arguments = {"page_size": S, "score": "mean_key", "group_reduce": group_reduce, "sink_pages": 1}
    heads = q.reshape(B, K, 3, D)
    positions = np.array([P * S - 1, P * S - 1])
    expected = np.einsum("bkgd,bkpzd->bkgp", heads, statistics.values)
    if group_reduce == "mass":
        expected = np.exp(np.where(np.arange(P) < P - 1, expected / np.sqrt(D), -np.inf))
        expected /= expected.sum(axis=3, keepdims=True)
    expected = expected.max(axis=2) if group_reduce == "max" else expected.mean(axis=2)
    scores, sizes = scores_and_sizes(q, statistics, positions // S, "mean_key", group_reduce)
    before = slice(None) if group_reduce != "mass" else slice(P - 1)
    np.testing.assert_allclose(scores[:, :, before], expected[:, :, before])
    assert (sizes > np.abs(scores))[:, :, before].all()
    forced = np.where(np.isin(np.arange(P), (0, P - 1)), np.inf, scores)
    ranked = np.argsort(-forced, axis=2)
    counts = np.array([[4, 5], [6, 3]])
    assert largest_distance((ranked, counts), (ranked, counts), q, statistics, positions, **arguments) == 0
    wrong = ranked.copy()
    wrong[1, 0, 5] = ranked[1, 0, 6]  # the next best
    found = largest_distance((wrong, counts), (ranked, counts), q, statistics, positions, **arguments)
    assert ROUNDING < found < 1
    other = (ranked, counts + 1)
    assert largest_distance(other, (ranked, counts), q, statistics, positions, **arguments) == np.inf
