"""What is read from the window of a decode state, against the state's own metrics and full attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.experiments.analyses.window import (
    by_query,
    full_attention,
    newly_attended,
    relative_distance,
    window_keys,
)
from tests.retro_jax.tiny import begin, force, tiny, token_ids

WINDOW, DENSE, STEPS = 3, 1, 20
LENGTHS = (37, 70)


def config(budget_tokens):
    return rj.DecodeConfig(
        "retro", window=WINDOW, budget_tokens=budget_tokens, dense_layers=DENSE, page_size=8
    )


def test_newly_attended_pages_are_those_that_the_metrics_count():
    model, tokens, sparse = tiny(), token_ids(2, 90), config(24)
    step = jax.jit(rj.decode_step, static_argnums=(1, 2))
    state, _ = begin(model, sparse, tokens, LENGTHS, 90)
    states = [state]
    for index in range(STEPS):
        newest = jnp.array([row[length + index] for row, length in zip(tokens, LENGTHS, strict=True)])
        states.append(step(model.params, model.config, sparse, states[-1], newest)[0])
    late = 0
    for before, after in itertools.pairwise(states):
        pages = [newly_attended(sparse, before, after, index) for index in (1, 2)]  # [layers, B, W, K, P]
        by_age = np.mean(np.sum(pages, axis=-1), axis=(0, 3))[:, ::-1]
        np.testing.assert_allclose(by_age, after.metrics.pages_attended, rtol=1e-6)
        late += by_age[:, 1:].sum()
    assert late > 0
    with pytest.raises(ValueError, match="layer 0 has full attention"):
        newly_attended(sparse, states[0], states[1], 0)


def test_with_a_budget_of_all_pages_outputs_and_keys_are_full_attentions():
    model, tokens, all_pages = tiny(), token_ids(2, 90), config(96)
    state, _ = begin(model, all_pages, tokens, (70, 70), 90)
    state, _ = force(model, all_pages, state, tokens, STEPS)
    full = full_attention(model.params, model.config, tokens)
    window = 70 + STEPS - WINDOW + np.arange(WINDOW)
    for index in range(DENSE, model.config.num_layers):
        layer = state.layers[index]
        outputs, keys = full.o[index][:, window[1:]], full.k[index][:, window]
        distances = relative_distance(layer.outputs.o, outputs)
        assert distances.shape == (2, WINDOW - 1)
        np.testing.assert_allclose(distances, 0, atol=1e-5)
        np.testing.assert_allclose(relative_distance(window_keys(layer.pages, window), keys), 0, atol=1e-5)


def test_relative_distance():
    expected = np.array([[[3.0, 0.0], [0.0, 4.0]]])  # one row, two heads, length 5
    given = np.array([[[3.0, 0.5], [0.0, 4.0]]])
    np.testing.assert_allclose(relative_distance(given, expected), [0.1])


def test_by_query_follows_each_query_through_the_slots():
    # The query of step n, seen r steps later: 10 n + r; the oldest slot comes first.
    values = np.array([[10 * (n - r) + r for r in (2, 1, 0)] for n in range(5)])
    np.testing.assert_array_equal(by_query(values), [[0, 1, 2], [10, 11, 12], [20, 21, 22]])
    with pytest.raises(ValueError, match="2 steps follow no query through 3 slots"):
        by_query(values[:2])
