"""Settings of JAX that the process has for other code change nothing: every token stays the same."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from tests.retro_jax.tiny import CENTROIDS, tiny, token_ids

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "infinities are errors": lambda: jax.debug_infs(True),
    "nan are errors": lambda: jax.debug_nans(True),
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "other random bits": lambda: jax.threefry_partitionable(False),
    "other generator": lambda: jax.default_prng_impl("rbg"),
    "tracer leaks": lambda: jax.checking_leaks(),
}
RETRO = rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=24, dense_layers=1, prefill_chunk=16)
MODEL = tiny(3, layers=2)


def run(config, sampling=None):
    """Tokens of a generation, and the scores of a text."""
    prompts, text = [token_ids(1, 20)[0], token_ids(1, 9)[0]], token_ids(1, 30)
    tokens = rj.generate(MODEL, prompts, config, 6, sampling=sampling).tokens
    return tokens, rj.score(MODEL, text, config, 20).nll.tolist()


expected = functools.cache(run)


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_and_score(setting):
    sampling = rj.Sampling(1.0)
    reference = expected(RETRO, sampling)
    with SETTINGS[setting]():
        assert run(RETRO, sampling) == reference


@pytest.mark.parametrize(
    "config",
    (
        rj.DecodeConfig("retro", page_size=8, budget_tokens=64, **CENTROIDS),
        rj.DecodeConfig("snapkv", page_size=8, budget_tokens=32, dense_layers=1, observation=4),
    ),
)
def test_other_parts_of_a_step_under_all_of_them(config):
    with contextlib.ExitStack() as settings:
        for setting in SETTINGS.values():
            settings.enter_context(setting())
        tokens = rj.generate(MODEL, [token_ids(1, 20)[0]], config, 6).tokens
    assert tokens == rj.generate(MODEL, [token_ids(1, 20)[0]], config, 6).tokens


def test_saved_states_under_all_of_them(tmp_path):
    state = rj.init_state(MODEL.config, RETRO, 1, 64)
    rj.save_state(MODEL, state, tmp_path / "usual", RETRO)
    with contextlib.ExitStack() as settings:
        for setting in SETTINGS.values():
            settings.enter_context(setting())
        rj.save_state(MODEL, state, tmp_path / "other", RETRO)
        longer = rj.load_state(MODEL, tmp_path / "usual", capacity=128)
    abouts = [(tmp_path / name / "about" / "about.json").read_text() for name in ("usual", "other")]
    assert abouts[0] == abouts[1]
    for array, fresh in zip(
        jax.tree.leaves(longer), jax.tree.leaves(rj.init_state(MODEL.config, RETRO, 1, 128)), strict=True
    ):
        assert array.dtype == fresh.dtype
        np.testing.assert_array_equal(array, fresh)


def pure_functions(ids):
    """What the pure functions give in a trace of the caller's own, from ids of whatever type it has."""

    @jax.jit
    def tokens(params, prompts, lengths):
        arguments = params, MODEL.config, RETRO
        state, logits = rj.prefill(*arguments, prompts, lengths, capacity=64)
        state, logits = rj.decode_step(*arguments, state, logits.argmax(-1))
        state, out = rj.decode(*arguments, state, logits.argmax(-1), 2, rj.Sampling(1.0))
        state, logits = rj.extend(*arguments, state, prompts[:, :4], lengths // 5)
        forced = jnp.stack([logits.argmax(-1), out.pending.astype(lengths.dtype)], axis=1)
        state, out = rj.teacher_force(*arguments, state, forced, forced, jnp.ones(forced.shape, bool))
        return logits, out.nll, state.length

    return jax.tree.map(np.asarray, tokens(MODEL.params, jnp.asarray(ids), jnp.array([20, 9])))


def test_pure_functions_in_a_trace_of_the_caller():
    ids = token_ids(2, 20).astype(int)
    reference = pure_functions(ids)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for value, usual in zip(pure_functions(ids), reference, strict=True):
            assert value.dtype == usual.dtype
            np.testing.assert_array_equal(value, usual)


def test_random_weights():
    reference = rj.load_model("random:tiny").params.embed
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(rj.load_model("random:tiny").params.embed, reference)
