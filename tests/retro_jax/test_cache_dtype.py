"""Keys and values in 8 bits: the laws of decoding hold with one cache for all, and its bytes are counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import CODES, dequantized
from retro_jax import models
from retro_jax.budget import Budget, budget_pages
from retro_jax.experiments.machine.memory import memory
from tests.retro_jax.tiny import (
    ATOL,
    CENTROIDS,
    assert_same_tokens,
    begin,
    force,
    forced_logits,
    step,
    tiny,
    token_ids,
)

MODEL, TOKENS, LENGTHS, STEPS = tiny(3), token_ids(3, 60), (2, 13, 37), 12
FULL = rj.DecodeConfig("full", page_size=8)
RETRO = rj.DecodeConfig(window=3, page_size=8, budget_tokens=24, dense_layers=1, cache_dtype="int8")


def full(dtype):
    """What full attention says with a cache of this dtype."""
    return forced_logits(MODEL, dataclasses.replace(FULL, cache_dtype=dtype), TOKENS, LENGTHS, STEPS)


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        *((dtype, {"method": "retro", "window": 3}) for dtype in CODES),
        ("int8", CENTROIDS | {"window": 3}),
        *(("int8", {"method": name}) for name in ("tova", "h2o")),
    ],
)
def test_with_a_budget_of_all_pages_it_is_full_attention_with_the_same_cache(dtype, fields):
    config = rj.DecodeConfig(page_size=8, budget_tokens=64, dense_layers=1, cache_dtype=dtype, **fields)
    logits = forced_logits(MODEL, config, TOKENS, LENGTHS, STEPS)
    np.testing.assert_allclose(logits, full(dtype), atol=ATOL)
    assert np.abs(full(dtype) - full(None)).max() > 100 * ATOL  # with another it is not


def test_eight_bits_of_one_scale_are_more_exact_than_those_of_one_exponent_each():
    """What to expect of codes: 0.5/127 of the largest channel, and 1/16 of each one, at most."""
    exact = full(None)
    spread = exact.std()
    integers, floats = (np.sqrt(np.mean((full(dtype) - exact) ** 2)) / spread for dtype in CODES)
    assert 0 < integers < 0.5 / 127
    assert integers < floats < 1 / 16


def test_laws_of_windows_hold():
    def logits(**fields):
        return forced_logits(MODEL, dataclasses.replace(RETRO, **fields), TOKENS, LENGTHS, STEPS)

    quest = logits(method="quest", window=1)
    np.testing.assert_array_equal(logits(window=1), quest)
    np.testing.assert_allclose(logits(overwrite=False), quest, atol=ATOL)
    assert np.abs(logits() - quest).max() > 1e-3


def test_a_sequence_depends_on_neither_its_batch_nor_the_capacity():
    together = forced_logits(MODEL, RETRO, TOKENS, LENGTHS, STEPS)
    for row, length in enumerate(LENGTHS):
        alone = forced_logits(MODEL, RETRO, TOKENS[row : row + 1], [length], STEPS, capacity=120)
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=ATOL)


def test_a_prompt_attends_to_the_cache_as_it_was_written():
    """In chunks of any size, or token by token: what is read is code times scale."""
    config = dataclasses.replace(FULL, cache_dtype="int8")
    state, by_token = begin(MODEL, config, TOKENS, LENGTHS, 64)
    state, by_token = force(MODEL, config, state, TOKENS, STEPS)
    lengths = np.array(LENGTHS) + STEPS
    for chunk in (5, 60):
        chunked = dataclasses.replace(config, prefill_chunk=chunk)
        filled, logits = begin(MODEL, chunked, TOKENS, lengths, 64)
        np.testing.assert_allclose(logits, by_token[-1], atol=ATOL)
        for got, want in zip(filled.layers, state.layers, strict=True):
            for row, length in enumerate(lengths):
                got_codes, want_codes = (
                    np.asarray(layer.pages.codes[row, :, : length // 8], int) for layer in (got, want)
                )
                # A number that lies between two codes may be rounded either way.
                assert np.abs(got_codes - want_codes).max() <= 1
                assert (got_codes != want_codes).mean() < 1e-3


def test_an_exact_cache_is_that_of_full_attention():
    config = dataclasses.replace(RETRO, window=None, method="quest", rectify_every=1)
    tokens, lengths = TOKENS, (20, 20, 20)
    caches = []
    for each in (config, dataclasses.replace(FULL, cache_dtype="int8")):
        state, _ = begin(MODEL, each, tokens, lengths, 64)
        state, _ = force(MODEL, each, state, tokens, STEPS)
        caches.append([dequantized(layer.pages)[:, :, : 32 // 8] for layer in state.layers])
    for got, want in zip(*caches, strict=True):
        assert (np.abs(np.asarray(got) - want) > 1e-5).mean() < 1e-3  # but for a code rounded the other way


def test_drafts_and_checks_share_one_cache():
    config = rj.DecodeConfig("quest", page_size=8, budget_tokens=16, dense_layers=0, cache_dtype="int8")
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]
    expected = rj.generate(MODEL, prompts, dataclasses.replace(FULL, cache_dtype="int8"), 24, stop_tokens=[])
    result = rj.generate(MODEL, prompts, config, 24, stop_tokens=[], verify=3)
    for prompt, *tokens in zip(prompts, result.tokens, expected.tokens, strict=True):
        assert_same_tokens(MODEL, expected.config, prompt, *tokens)
    checks, heads = np.asarray(result.metrics.check_bytes), 2 * MODEL.config.num_layers * 2
    assert (
        checks.sum() % (heads * (16 + 4)) == 0 and checks.sum() > 0
    )  # whole vectors of 16 codes and a scale


def test_sharded_is_unsharded():
    mesh = rj.make_mesh(1, 2)
    params = rj.shard_params(MODEL.params, MODEL.config, mesh)
    state, _ = begin(MODEL, RETRO, TOKENS, LENGTHS, 60)
    state = rj.shard_state(state, MODEL.config, mesh)
    sharded = rj.Model(MODEL.config, params, None)
    state, logits = force(sharded, RETRO, state, TOKENS, STEPS)
    np.testing.assert_allclose(logits, forced_logits(MODEL, RETRO, TOKENS, LENGTHS, STEPS), atol=ATOL)
    for array in jax.tree.leaves(state.layers[-1].pages):
        assert array.sharding.shard_shape(array.shape)[:2] == (3, 1)


def test_a_step_updates_the_cache_in_place_and_is_compiled_once():
    state, _ = begin(MODEL, RETRO, TOKENS, LENGTHS, 60)
    before = step._cache_size()
    force(MODEL, RETRO, state, TOKENS, STEPS)
    assert step._cache_size() <= before + 1

    capacity = 2**19  # one layer's cache outweighs everything else
    config = dataclasses.replace(RETRO, method="quest", window=1)
    model = dataclasses.replace(MODEL.config, max_positions=capacity, num_layers=2)
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    state = jax.eval_shape(lambda: rj.init_state(model, config, 1, capacity))
    compiled = step.lower(params, model, config, state, jax.ShapeDtypeStruct((1,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < state.layers[0].pages.codes.size


def test_bytes_of_the_state_are_those_of_codes_and_scales():
    def bytes_of(dtype):
        return memory(MODEL.config, dataclasses.replace(RETRO, cache_dtype=dtype), 2, 128).state

    vectors = MODEL.config.num_layers * 2 * 2 * 128 * 2  # of B, K, tokens, keys and values
    assert bytes_of(None) - bytes_of("int8") == vectors * (16 * 4 - (16 + 4))
    assert bytes_of("float8_e4m3fn") == bytes_of("int8")


def test_bytes_of_a_step_are_those_of_codes_and_scales():
    """One dense layer, and two that load 3 pages of 8 tokens; their bounds stay in float32."""
    tokens, length = token_ids(1, 60), 40
    for dtype, vector in (("int8", 16 + 4), (None, 16 * 4)):
        config = dataclasses.replace(RETRO, cache_dtype=dtype)
        state, _ = begin(MODEL, config, tokens, [length], 60)
        state, _ = step(MODEL.params, MODEL.config, config, state, jnp.asarray(tokens[:, length]))
        bounds = 2 * 6 * 2 * 16 * 4  # of two layers, 6 pages, 2 vectors each
        read = 2 * ((2 * 41 + 2 * 2 * 24) * vector + bounds)  # of 2 KV heads
        assert float(state.metrics.kv_bytes[0]) == read


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_budget_of_traffic_buys_what_fits_into_quests_bytes(head_dim):
    context = jnp.array([64, 4096, 8192])

    def pages(**fields):
        config = rj.DecodeConfig(budget_tokens=256, **fields)
        return np.array(budget_pages(config, Budget.of(config, 3), context, head_dim, 2))

    assert (pages(cache_dtype="int8") == 16).all()  # of pages: no more than without
    for dtype in CODES:
        many = pages(cache_dtype=dtype, budget_covers="traffic")
        quest = 16 * 2 * 16 * head_dim * 2  # bytes of its pages; the bounds are the same for both
        page = 2 * 16 * (head_dim + 4)
        np.testing.assert_array_equal(many, quest // page)
        assert (many >= 30).all()
        with_means = pages(
            cache_dtype=dtype, budget_covers="traffic", score="mean_key", statistics="mean_key_int8"
        )
        saved = (context // 16) * (2 * head_dim * 2 - (head_dim + 4))
        np.testing.assert_array_equal(with_means, (quest + saved) // page)


def test_a_text_is_scored_with_a_cache_of_8_bits():
    score = rj.score(MODEL, TOKENS[0], RETRO, prompt_tokens=40)
    logits = forced_logits(MODEL, RETRO, TOKENS[:1], [40], STEPS)[:, 0]
    likely = jax.nn.log_softmax(logits)[np.arange(STEPS), TOKENS[0, 41 : 41 + STEPS]]
    np.testing.assert_allclose(score.nll[0, 1 : STEPS + 1], -likely, atol=ATOL)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"cache_dtype 'int4' is unknown .*; use None or one of int8, float8_e4"
    ):
        rj.DecodeConfig(cache_dtype="int4")
    state = rj.init_state(MODEL.config, RETRO, 1, 64)
    for config, message in (
        (
            dataclasses.replace(RETRO, cache_dtype=None),
            "cache_dtype is None, but the state was made with 'int8'",
        ),
        (
            dataclasses.replace(RETRO, page_size=16, budget_tokens=48),
            "page_size is 16, .* was made with 8; use",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rj.decode_step(MODEL.params, MODEL.config, config, state, jnp.zeros(1, jnp.int32))
        with pytest.raises(ValueError, match=message):
            rj.extend(MODEL.params, MODEL.config, config, state, jnp.asarray(TOKENS[:1]), jnp.array([4]))
