import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import Statistics
from pallas_kernels.statistics import statistic_of
from tests.pallas_kernels import oracle
from tests.pallas_kernels.inputs import PAGES, random_cache

HEADS, DIM = 2, 8


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["min_max", "mean_key"]),
    tokens=st.integers(1, 12),
    page_size=st.sampled_from([4, 8]),
)
def test_update_equals_the_oracle(seed, kind, tokens, page_size):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, PAGES * page_size - tokens, 3)
    lengths[2] = 1
    pages = random_cache(rng, lengths, page_size, HEADS, DIM)
    vectors = pallas_kernels.STATISTICS[kind].vectors
    statistics = rng.standard_normal((3, HEADS, PAGES, vectors, DIM)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, tokens, HEADS, DIM)).astype(np.float32)
    # Sequence 0 overwrites its last tokens and appends one, 1 appends the first few, 2 is left as it is.
    start = np.array([lengths[0] - tokens + 1, lengths[1], lengths[2]], np.int32)
    write = np.zeros((3, tokens), bool)
    write[0] = start[0] + np.arange(tokens) >= 0
    write[1, : rng.integers(0, tokens + 1)] = True

    want_pages, want_statistics = pages.copy(), statistics.copy()
    for b in range(3):
        for t in np.flatnonzero(write[b]):
            page, offset = divmod(start[b] + t, page_size)
            want_pages[b, :, page, 0, offset], want_pages[b, :, page, 1, offset] = k[b, t], v[b, t]
        if write[b].any():
            end = start[b] + np.flatnonzero(write[b])[-1] + 1
            for page in range(max(start[b], 0) // page_size, -(-end // page_size)):
                for head in range(HEADS):
                    keys = want_pages[b, head, page, 0, : end - page * page_size]
                    want_statistics[b, head, page] = oracle.statistics(keys, kind)

    arguments = tuple(map(jnp.asarray, (k, v, start, write)))
    got_pages, got_statistics = pallas_kernels.update_pages(
        jnp.asarray(pages), Statistics(jnp.asarray(statistics), kind=kind), *arguments
    )
    np.testing.assert_array_equal(got_pages, want_pages)
    np.testing.assert_allclose(got_statistics.values, want_statistics, atol=1e-6)
    only_pages, none = pallas_kernels.update_pages(jnp.asarray(pages), None, *arguments)
    np.testing.assert_array_equal(only_pages, want_pages)
    assert none is None


def test_eight_bits_keep_the_mean_key_to_half_a_unit():
    rng = np.random.default_rng(0)
    lengths = np.array([10, 4])
    pages = jnp.asarray(random_cache(rng, lengths, 4, HEADS, DIM))
    k, v = rng.standard_normal((2, 2, 6, HEADS, DIM)).astype(np.float32)
    k[1, :, 0] = 0  # a page of zeros has no scale to divide by
    write = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    exact, eight = (
        pallas_kernels.STATISTICS[kind].zeros((2, HEADS, PAGES), DIM, "float32")
        for kind in ("mean_key", "mean_key_int8")
    )
    arguments = (jnp.asarray(k), jnp.asarray(v), jnp.array([9, 4]), write)
    want_pages, exact = pallas_kernels.update_pages(pages, exact, *arguments)
    got_pages, eight = pallas_kernels.update_pages(pages, eight, *arguments)
    np.testing.assert_array_equal(got_pages, want_pages)
    assert eight.values.dtype == jnp.int8 and int(jnp.abs(eight.values).max()) == 127
    touched = np.asarray(exact.values)[0, :, 2:4]
    error = np.abs(np.asarray(eight.at_float32())[0, :, 2:4] - touched)
    assert error.max() > 0 and (error <= np.abs(touched).max(axis=-1, keepdims=True) / 254 + 1e-6).all()
    assert not eight.values[1, 0].any() and not np.isnan(eight.scales).any()
    with pytest.raises(ValueError, match="with some scales were given; 'mean_key' has values without scales"):
        pallas_kernels.update_pages(pages, eight.replace(kind="mean_key"), *arguments)


def test_an_overwritten_key_shrinks_the_bounds():
    pages, statistics = jnp.zeros((1, 1, 2, 2, 4, 1)), Statistics(jnp.zeros((1, 1, 2, 2, 1)))
    ones = jnp.ones((1, 1, 1, 1))
    write = jnp.ones((1, 1), bool)
    for position, value in ((0, 5.0), (1, 1.0)):
        pages, statistics = pallas_kernels.update_pages(
            pages, statistics, value * ones, ones, jnp.array([position]), write
        )
    assert statistics.values[0, 0, 0, :, 0].tolist() == [1.0, 5.0]
    two = jnp.array([[[[2.0]], [[1.0]]]])
    pages, statistics = pallas_kernels.update_pages(
        pages, statistics, two, two, jnp.array([0]), jnp.ones((1, 2), bool)
    )
    assert statistics.values[0, 0, 0, :, 0].tolist() == [1.0, 2.0]


def test_bad_arguments_are_refused():
    pages, k = jnp.zeros((1, 1, 2, 2, 4, 1)), jnp.ones((1, 1, 1, 1))
    arguments = (k, k, jnp.array([0]), jnp.ones((1, 1), bool))
    with pytest.raises(ValueError, match="statistics 'median' are unknown; use one of min_max, mean_key"):
        pallas_kernels.update_pages(pages, Statistics(jnp.zeros((1, 1, 2, 2, 1)), kind="median"), *arguments)
    with pytest.raises(ValueError, match="2 vectors per page were given; 'mean_key' has 1"):
        pallas_kernels.update_pages(
            pages, Statistics(jnp.zeros((1, 1, 2, 2, 1)), kind="mean_key"), *arguments
        )
    with pytest.raises(TypeError, match=r"use Statistics\(values, kind=...\)"):
        statistic_of.__wrapped__(jnp.zeros((1, 1, 2, 2, 1)))
