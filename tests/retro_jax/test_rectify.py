"""Rectification against a cache that full attention wrote."""

import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from tests.retro_jax.tiny import ATOL, CENTROIDS, begin, force, forced_logits, prefill, step, tiny, token_ids

LENGTHS = (2, 13, 37)


def sparse(window=1, **fields) -> rj.DecodeConfig:
    fields = {"method": "retro", "budget_tokens": 24, "page_size": 8, "dense_layers": 1} | fields
    return rj.DecodeConfig(window=window, **fields)


@pytest.mark.parametrize(("window", "fields"), ((1, {}), (3, {}), (3, CENTROIDS)))
def test_every_token_gives_what_a_sparse_query_gives_on_a_prefilled_cache(window, fields):
    model, tokens, steps = tiny(), token_ids(3, 80), 12
    logits = forced_logits(model, sparse(window, rectify_every=1, **fields), tokens, LENGTHS, steps)
    stale = forced_logits(model, sparse(window, **fields), tokens, LENGTHS, steps)
    config = sparse(window, **fields)
    for ahead in range(steps):
        lengths = np.array(LENGTHS) + ahead
        state, _ = begin(model, config, tokens, lengths, 80)
        _, expected = force(model, config, state, tokens, 1)
        np.testing.assert_allclose(logits[ahead], expected[0], atol=ATOL)
    assert np.abs(stale[-1] - logits[-1]).max() > 1e-3  # there was something to rectify


@pytest.mark.parametrize("every", (2, 5))
def test_the_cache_behind_the_last_pass_is_that_of_full_attention(every):
    model, tokens, steps = tiny(), token_ids(3, 80), 10
    config = sparse(3, rectify_every=every)
    state, _ = begin(model, config, tokens, LENGTHS, 80)
    state, _ = force(model, config, state, tokens, steps)
    lengths = np.array(LENGTHS) + steps
    exact, _ = begin(model, config, tokens, lengths, 80)
    np.testing.assert_array_equal(state.stale.count, 0)
    np.testing.assert_array_equal(state.length, exact.length)
    np.testing.assert_array_equal(state.decoded, 0)
    for found, wanted in zip(state.layers, exact.layers, strict=True):
        for row, length in enumerate(lengths):
            written, expected = (_tokens(layer.pages, row)[:length] for layer in (found, wanted))
            np.testing.assert_allclose(written, expected, atol=ATOL)
            if found.statistics is not None:
                begun = -(-length // 8)
                np.testing.assert_allclose(
                    *(layer.statistics.values[row, :, :begun] for layer in (found, wanted)), atol=ATOL
                )


def _tokens(pages, row):
    """Keys and values [T, K, 2, D] of one sequence."""
    K, P, _, S, D = pages.shape[1:]
    return np.asarray(pages[row]).transpose(1, 3, 0, 2, 4).reshape(P * S, K, 2, D)


def test_a_pass_that_has_not_come_changes_nothing():
    model, tokens = tiny(), token_ids(3, 80)
    never = forced_logits(model, sparse(3), tokens, LENGTHS, 9)
    later = forced_logits(model, sparse(3, rectify_every=9), tokens, LENGTHS, 9)
    np.testing.assert_array_equal(later, never)


def test_sequences_are_rectified_each_in_its_own_time():
    """One sequence decodes alone at first, so that the others are due at other steps."""
    model, tokens = tiny(), token_ids(3, 80)
    config = sparse(3, rectify_every=4)

    def run(row, ahead, steps):
        state, _ = begin(model, config, tokens, LENGTHS, 80)
        logits = []
        for index in range(ahead + steps):
            active = (
                jnp.array([True, index >= ahead, index >= ahead]) if row is None else jnp.arange(3) == row
            )
            newest = jnp.asarray(tokens[np.arange(3), np.asarray(state.length)])
            state, out = step(model.params, model.config, config, state, newest, active)
            logits.append(np.asarray(out))
        return np.stack(logits)

    together = run(None, 2, 9)
    np.testing.assert_allclose(together[:, 0], run(0, 0, 11)[:, 0], atol=ATOL)
    np.testing.assert_allclose(together[2:, 1], run(1, 0, 9)[:, 1], atol=ATOL)


def test_a_next_turn_finds_an_exact_cache():
    model, tokens, steps, more = tiny(), token_ids(3, 80), 3, 7
    config = sparse(3, rectify_every=8)
    state, _ = begin(model, config, tokens, LENGTHS, 80)
    state, _ = force(model, config, state, tokens, steps)
    turn = np.stack([tokens[row, length + steps :][:more] for row, length in enumerate(LENGTHS)])
    counts = jnp.full(3, more)
    state, logits = rj.extend(model.params, model.config, config, state, jnp.asarray(turn), counts)
    full = np.asarray(models.forward(model.params, model.config, tokens))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row], full[row, length + steps + more - 1], atol=ATOL)


def test_what_a_pass_reads_is_counted():
    model, tokens = tiny(), token_ids(2, 60)
    lengths, every, steps = (30, 30), 4, 8

    def read(config):
        state, _ = prefill(model.params, model.config, config, tokens[:, :30], np.array(lengths), capacity=60)
        _, forced = rj.teacher_force(
            model.params,
            model.config,
            config,
            state,
            jnp.asarray(tokens[:, 30:38]),
            jnp.asarray(tokens[:, 31:39]),
            jnp.ones((2, steps), bool),
        )
        return np.asarray(forced.metrics.kv_bytes)

    more = read(sparse(rectify_every=every)) - read(sparse())
    token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, KV heads, channels, bytes
    expected = np.zeros((steps, 2))
    expected[every - 1 :: every] = token * np.array([[34], [38]])
    np.testing.assert_array_equal(more, expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"rectify_every": 0}, "rectify_every 0 is below 1"),
        ({"rectify_every": 4, "method": "full", "window": None}, "exact cache by itself"),
        ({"rectify_every": 4, "method": "h2o", "window": None}, "evicts pages"),
        ({"rectify_every": 4, "evict": "tova", "cache_tokens": 64}, "evicts pages"),
    ),
)
def test_what_cannot_be_rectified_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        sparse(**{"window": None, **fields})
