"""What does not fit gives NaN for its own sequence, which stays as it was; its batch mates do not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from tests.retro_jax.tiny import prefill, step, tiny, token_ids

MODEL = tiny(3, layers=2)
CONFIGS = {
    "retro": rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=24, dense_layers=1),
    "h2o": rj.DecodeConfig("h2o", page_size=8, budget_tokens=24, dense_layers=1),
}
CAPACITY = 64  # what 8 pages hold
NEAR, FAR = 62, 20  # lengths of two sequences

extend = jax.jit(rj.extend, static_argnames=("model", "config"))
decode = jax.jit(rj.decode, static_argnames=("model", "config", "steps"))
force = jax.jit(rj.teacher_force, static_argnames=("model", "config"))


def filled(config, model=MODEL.config, lengths=(NEAR, FAR)):
    """A state of sequences of these lengths, as if of zeros: what lies in the cache does not matter here."""
    return rj.init_state(model, config, 2, CAPACITY).replace(length=jnp.array(lengths))


def rows(state, sequence):
    """All that the state holds of one sequence, without metrics."""
    return [np.asarray(leaf)[sequence] for leaf in jax.tree.leaves(state.replace(metrics=None))]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_without_room_gives_nan_and_changes_nothing(name):
    model, config = MODEL, CONFIGS[name]
    state, alone = filled(config), filled(config, lengths=(FAR, FAR))
    tokens = jnp.array([5, 7])
    for taken in range(1, CAPACITY - NEAR + 1):
        state, logits = step(model.params, model.config, config, state, tokens)
        alone, _ = step(model.params, model.config, config, alone, tokens)
        assert state.length.tolist() == [NEAR + taken, FAR + taken] and np.isfinite(logits).all()
    full = rows(state, 0)
    for _ in range(3):
        state, logits = step(model.params, model.config, config, state, tokens)
        alone, expected = step(model.params, model.config, config, alone, tokens)
        assert np.isnan(logits[0]).all()
        np.testing.assert_allclose(logits[1], expected[1], atol=1e-5)
        assert float(state.metrics.kv_bytes[0]) == 0 < float(state.metrics.kv_bytes[1])
    for before, after in zip(full, rows(state, 0), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_last_position_of_the_model_ends_a_sequence_before_the_last_page_does():
    model = dataclasses.replace(MODEL.config, max_positions=CAPACITY)
    config = dataclasses.replace(CONFIGS["retro"], page_size=16)  # 8 pages hold 128
    state = filled(config, model)
    assert state.capacity == 128 and state.room(model).tolist() == [2, CAPACITY - FAR]
    for finite in (True, True, False):
        state, logits = step(MODEL.params, model, config, state, jnp.array([5, 7]))
        assert bool(np.isfinite(logits[0]).all()) == finite
    assert state.length.tolist() == [CAPACITY, FAR + 3]


@pytest.mark.parametrize("calls", ((5,), (1,) * 5))
def test_decode_ends_a_sequence_without_room(calls):
    model, config = MODEL, CONFIGS["retro"]
    state, pending, remaining = filled(config), jnp.array([5, 7]), jnp.array([9, 9])
    emitted = []
    for steps in calls:
        state, out = decode(
            model.params, model.config, config, state, pending, steps=steps, remaining=remaining
        )
        pending, remaining = out.pending, out.remaining
        emitted.append(np.asarray(out.emitted))
        assert np.asarray(out.finite).all()
    assert np.concatenate(emitted, axis=1).sum(axis=1).tolist() == [CAPACITY - NEAR, 5]
    assert remaining.tolist() == [0, 4] and state.length.tolist() == [CAPACITY, FAR + 5]


def test_forced_tokens_without_room_are_nan_and_no_hits():
    model, config = MODEL, CONFIGS["retro"]
    tokens = jnp.zeros((2, 4), jnp.int32)  # NaN in all places would have its maximum at the first, token 0
    state, out = force(
        model.params, model.config, config, filled(config), tokens, tokens, jnp.ones((2, 4), bool)
    )
    assert np.isnan(out.nll).tolist() == [[False, False, True, True], [False] * 4]
    assert out.finite.tolist() == [[True, True, False, False], [True] * 4]
    assert not out.hits[0, 2:].any() and state.length.tolist() == [CAPACITY, FAR + 4]


@pytest.mark.parametrize("lengths", ((3, 4), (-1, 4), (9, 8)))
def test_tokens_that_do_not_fit_are_not_appended(lengths):
    model, config = MODEL, CONFIGS["retro"]
    before = filled(config)
    state, logits = extend(
        model.params, model.config, config, before, token_ids(2, 8), np.array(lengths, np.int32)
    )
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    assert state.length.tolist() == [NEAR, FAR + lengths[1]]
    for old, new in zip(rows(before, 0), rows(state, 0), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_prompt_of_an_impossible_length_is_nan():
    state, logits = prefill(
        MODEL.params, MODEL.config, CONFIGS["retro"], token_ids(3, 8), jnp.array([0, 9, 8]), capacity=CAPACITY
    )
    assert np.isnan(logits).all(axis=1).tolist() == [True, True, False]
    assert state.length.tolist() == [0, 0, 8]
