import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels import oracle
from tests.pallas_kernels.inputs import random_cache, random_retro_inputs, window_positions

LENGTHS = (1, 7, 16, 61)
ATOL = 2e-6  # float32, values of order one


def retro_attention(*arrays):
    return pallas_kernels.retro_attention(*map(jnp.asarray, arrays))


def dense_attention(*arrays):
    return pallas_kernels.dense_attention(*map(jnp.asarray, arrays))


def merge(*arrays):
    return pallas_kernels.merge(*(jnp.asarray(array, jnp.float32) for array in arrays))


@pytest.mark.parametrize("window", (1, 2, 5))
@pytest.mark.parametrize("group", (1, 3))
@pytest.mark.parametrize("page_size", (8, 16))
def test_retro_attention_equals_the_oracle(window, group, page_size):
    rng = np.random.default_rng(window * 100 + group * 10 + page_size)
    inputs = random_retro_inputs(rng, LENGTHS, window, group, page_size)
    expected = oracle.retro_attention(*inputs)
    actual = retro_attention(*inputs)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=ATOL)


def test_a_window_moves_the_output_cache_of_active_sequences_on():
    rng = np.random.default_rng(2)
    *inputs, cached_o, cached_lse = random_retro_inputs(rng, LENGTHS, 3, 2, 8)
    active = np.array([True, False, True, False])
    o, lse, last_loaded = retro_attention(*inputs, cached_o, cached_lse)
    got = pallas_kernels.attend_window(
        *map(jnp.asarray, (*inputs, cached_o, cached_lse, active)), dtype=jnp.bfloat16
    )
    np.testing.assert_array_equal(got[0], o.astype(jnp.bfloat16))
    for array, wanted in zip(got[1:3], (lse, last_loaded), strict=True):
        np.testing.assert_array_equal(array, wanted)
    for moved, whole, before in zip(got[3:5], (o, lse), (cached_o, cached_lse), strict=True):
        np.testing.assert_array_equal(moved[active], whole[active, 1:])
        np.testing.assert_array_equal(moved[~active], before[~active])
    _, _, page_ids, counts, before, _ = inputs
    assert counts.any()
    for place in zip(*np.nonzero(np.arange(page_ids.shape[2]) < counts[..., None]), strict=True):
        page = page_ids[place]
        assert got[5][place] == max(before[(*place[:2], page)] + 1, page * 8)


def test_dense_attention_rounds_once_to_the_dtype_that_is_asked_for():
    rng = np.random.default_rng(3)
    q = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)
    inputs = (*map(jnp.asarray, (q, random_cache(rng, (20,), 8), np.array([[19]], np.int32))),)
    sinks = jnp.zeros(4)
    whole = pallas_kernels.dense_attention(*inputs, sinks)
    rounded = pallas_kernels.dense_attention(*inputs, sinks, dtype=jnp.bfloat16)
    assert (whole.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, whole.astype(jnp.bfloat16))


def test_a_slot_that_sees_nothing_has_no_weight():
    rng = np.random.default_rng(0)
    inputs = list(random_retro_inputs(rng, (40,), 3, 2, 8))
    inputs[3][:] = 0  # nothing is selected
    inputs[7][:] = -np.inf
    inputs[6][:] = 0
    o, lse, last_loaded = retro_attention(*inputs)
    assert np.all(np.asarray(o) == 0) and np.all(np.isneginf(lse))
    np.testing.assert_array_equal(last_loaded, inputs[4])


def test_revising_in_any_order_gives_attention_over_the_union():
    rng = np.random.default_rng(1)
    length, page_size = 64, 8
    pages = random_cache(rng, (length,), page_size)
    q = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)
    sets = [[7, 1], [2, 1], [0, 7, 5], [5]]  # repeats must not count twice
    last_loaded = np.full((1, 2, pages.shape[2]), -1, np.int32)
    o, lse = np.zeros((1, 1, 4, 8), np.float32), np.full((1, 1, 4), -np.inf, np.float32)
    position = length - 1
    for later, chosen in enumerate(sets):
        ids = np.broadcast_to(np.int32(chosen), (1, 2, len(chosen)))
        slots = np.concatenate([q, rng.standard_normal(q.shape).astype(np.float32)], axis=1)
        positions = np.array([[position, position + later]], np.int32)
        if later == 0:  # its own step: the query is the newest slot
            slots, positions = slots[:, ::-1], np.array([[-1, position]], np.int32)
        out, sums, last_loaded = retro_attention(
            slots, pages, ids, np.full((1, 2), len(chosen), np.int32), last_loaded, positions, o, lse
        )
        slot = 1 if later == 0 else 0
        o, lse = np.asarray(out)[:, slot : slot + 1], np.asarray(sums)[:, slot : slot + 1]
    for head in range(4):
        want, want_lse = oracle.attend(
            q[0, 0, head], *oracle.tokens_of(pages[0], head // 2, [0, 1, 2, 5, 7], position)
        )
        np.testing.assert_allclose(o[0, 0, head], want, atol=ATOL)
        np.testing.assert_allclose(lse[0, 0, head], want_lse, atol=ATOL)


@pytest.mark.parametrize("tokens", (1, 5))
@pytest.mark.parametrize("block_tokens", (16, 40, 1024))
def test_dense_attention_equals_the_oracle(tokens, block_tokens, monkeypatch):
    from pallas_kernels.attention import reference

    monkeypatch.setattr(reference, "_BLOCK_TOKENS", block_tokens)  # blocks that do and do not divide P
    rng = np.random.default_rng(tokens)
    pages = random_cache(rng, LENGTHS, 8)
    q = rng.standard_normal((len(LENGTHS), tokens, 6, 8)).astype(np.float32)
    positions = window_positions(LENGTHS, tokens)
    np.testing.assert_allclose(
        dense_attention(q, pages, positions),
        oracle.dense_attention(q, pages, positions),
        atol=ATOL,
    )


def test_a_sink_takes_weight_and_gives_nothing():
    rng = np.random.default_rng(4)
    pages = random_cache(rng, LENGTHS, 8)
    q = rng.standard_normal((len(LENGTHS), 2, 6, 8)).astype(np.float32)
    positions = window_positions(LENGTHS, 2)
    sinks = np.array([-90.0, -3.0, 0.0, 0.5, 4.0, 90.0], np.float32)
    allowed = np.ones(pages.shape[:3], bool)
    o = dense_attention(q, pages, positions, sinks)
    over_pages = pallas_kernels.attend_pages(*map(jnp.asarray, (q, pages, positions, allowed, sinks)))
    np.testing.assert_array_equal(o, over_pages)
    for b, t, n in np.ndindex(*q.shape[:3]):
        tokens = oracle.tokens_of(pages[b], n // 3, range(pages.shape[2]), positions[b, t])
        want, _ = oracle.merge(*oracle.attend(q[b, t, n], *tokens), 0.0, sinks[n])
        np.testing.assert_allclose(o[b, t, n], want, atol=ATOL)


def test_merge_joins_disjoint_sets_and_ignores_empty_ones():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal(8), rng.standard_normal((9, 8)), rng.standard_normal((9, 8))
    (o_a, lse_a), (o_b, lse_b) = oracle.attend(q, k[:4], v[:4]), oracle.attend(q, k[4:], v[4:])
    o, lse = merge(*(np.float32(x) for x in (o_a, lse_a, o_b, lse_b)))
    want, want_lse = oracle.attend(q, k, v)
    np.testing.assert_allclose(o, want, atol=ATOL)
    np.testing.assert_allclose(lse, want_lse, atol=ATOL)
    empty = np.zeros(8, np.float32), np.float32(-np.inf)
    for pair in ((*empty, np.float32(o_a), np.float32(lse_a)), (np.float32(o_a), np.float32(lse_a), *empty)):
        o, lse = merge(*pair)
        np.testing.assert_allclose(o, o_a, atol=ATOL)
        np.testing.assert_allclose(lse, lse_a, atol=ATOL)
    o, lse = merge(*empty, *empty)
    assert np.all(np.asarray(o) == 0) and np.isneginf(lse)


def test_heads_and_slots_that_do_not_fit_are_refused():
    inputs = list(random_retro_inputs(np.random.default_rng(0), (9,), 3, 2, 8))
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2 KV heads"):
        retro_attention(
            inputs[0][:, :, 1:][:, :, [0, 1, 2, 0, 1]],
            *inputs[1:6],
            *[cache[:, :, [0, 1, 2, 0, 1]] for cache in inputs[6:]],
        )
    with pytest.raises(ValueError, match=r"output cache holds 2 slots; a window of 2 needs 1"):
        retro_attention(inputs[0][:, 1:], *inputs[1:5], inputs[5][:, 1:], *inputs[6:])
    with pytest.raises(ValueError, match=r"output cache holds 2 slots; a window of 2 needs 1"):
        one_less = inputs[0][:, 1:], *inputs[1:5], inputs[5][:, 1:], *inputs[6:], np.ones(1, bool)
        pallas_kernels.attend_window(*map(jnp.asarray, one_less), dtype=jnp.float32)
