import math

import numpy as np
import pytest

from retro_jax.experiments.io.estimates import block_means, estimate, position_bins, ratio, running_mean


def test_block_means_drop_the_rest():
    assert block_means(np.arange(7.0)[None], 2).tolist() == [[0.5, 2.5, 4.5]]


def test_estimate_of_known_numbers():
    # Two texts; block means 0, 2 and 10, 14: variances 2 and 8, over 2 blocks and 2 texts: sqrt(10 / 2) / 2.
    values = np.repeat([[0.0, 2.0], [10.0, 14.0]], 3, axis=1)
    found = estimate(values, block=3)
    assert found.mean == 6.5
    assert found.error == pytest.approx(math.sqrt(5) / 2)


def test_difference_between_texts_is_no_error():
    assert estimate(np.repeat([[1.0], [9.0]], 12, axis=1), block=3).error == 0.0


def test_error_is_unknown_for_a_single_block():
    assert math.isnan(estimate(np.ones((1, 5)), block=3).error)


def test_error_sees_correlation():
    # A slow random walk of correlation length ~100 tokens: errors from single tokens would be far too small.
    noise = np.random.default_rng(0).normal(size=200)
    slow = np.repeat(noise, 64)[None]
    honest, naive = estimate(slow, block=64).error, estimate(slow, block=1).error
    assert honest / naive == pytest.approx(8.0, rel=0.01)  # sqrt(64)


def test_ratio_of_proportional_values_is_exact():
    baseline = np.random.default_rng(0).normal(1.0, 1.0, size=(2, 256))
    found = ratio(0.25 * baseline, baseline)
    assert found.mean == pytest.approx(0.25)
    assert found.error == pytest.approx(0.0, abs=1e-12)


def test_ratio_error_matches_its_spread():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        baseline = rng.normal(1.0, 1.0, size=(1, 640))
        found.append(ratio(0.5 * baseline + rng.normal(0.0, 0.5, size=baseline.shape), baseline, block=16))
    spread = np.std([value.mean for value in found])
    assert np.mean([value.error for value in found]) == pytest.approx(spread, rel=0.15)


def test_ratio_to_nothing_is_not_a_number():
    assert math.isnan(ratio(np.ones((1, 128)), np.zeros((1, 128))).mean)
    about_zero = np.random.default_rng(0).normal(size=(2, 6400))
    about_zero -= about_zero.mean()
    errors = estimate(about_zero).error
    for mean, told in ((0.1, False), (-1.9, False), (2.1, True), (-2.1, True)):
        found = ratio(about_zero + 1.0, about_zero + mean * errors)
        assert math.isfinite(found.mean) == math.isfinite(found.error) == told


def test_position_bins():
    assert position_bins(1024, 4096, 1024) == [(1024, 2048), (2048, 3072), (3072, 4096)]
    assert position_bins(100, 330, 100) == [(100, 200), (200, 330)]  # 30 tokens join the bin before
    assert position_bins(100, 350, 100) == [(100, 200), (200, 300), (300, 350)]
    assert position_bins(100, 120, 100) == [(100, 120)]


def test_running_mean():
    values = np.array([[0.0, 0.0, 2.0, 2.0, 4.0, 4.0]])
    centres, means, errors = running_mean(values, span=2, block=2)
    assert centres.tolist() == [2.0, 4.0]
    assert means.tolist() == [1.0, 3.0]
    assert errors.tolist() == [1.0, 1.0]


def test_running_mean_names_the_limit():
    with pytest.raises(ValueError, match="span 4 exceeds the 3 blocks of 2 tokens"):
        running_mean(np.zeros((1, 6)), span=4, block=2)
