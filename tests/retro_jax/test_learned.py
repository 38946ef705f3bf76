"""The learned score: summaries follow the pages, decoding reads them, and other weights are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import STATISTICS
from retro_jax.budget import vectors_per_page
from retro_jax.learned import initial_score, learned_queries, page_summaries
from retro_jax.models import LayerKind, LearnedScore, Rope
from tests.retro_jax.tiny import ATOL, force, prefill, tiny, token_ids

SIZE, CHANNELS = 4, 8
CONFIG = rj.DecodeConfig(
    method="retro",
    window=2,
    score="learned",
    score_channels=CHANNELS,
    page_size=SIZE,
    budget_tokens=20,
    dense_layers=1,
    group_reduce="mass",
)


def random_score(seed: int, N: int = 4, K: int = 2, D: int = 16) -> LearnedScore:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return LearnedScore(
        query=draw(N, D, CHANNELS),
        query_bias=draw(N, CHANNELS),
        key=draw(K, 3 * D, CHANNELS),
        key_bias=draw(K, CHANNELS),
        log_frequencies=draw(K, CHANNELS // 2) - 2,
        page_size=SIZE,
    )


@functools.cache
def learned() -> rj.Model:
    """The tiny model with a random score in each layer."""
    model = tiny()
    layers = tuple(
        layer.replace(page_score=random_score(index)) for index, layer in enumerate(model.params.layers)
    )
    return dataclasses.replace(model, params=model.params.replace(layers=layers))


def begin(model, config, tokens, lengths):
    return prefill(model.params, model.config, config, tokens, jnp.array(lengths), capacity=40)[0]


def forced_logits(model, config, tokens, lengths, steps):
    return force(model, config, begin(model, config, tokens, lengths), tokens, steps)[1]


def expected_summaries(score, kind, keys):
    """Of one KV head's whole pages [P, S, D], in loops."""
    found = []
    for page, tokens in enumerate(np.asarray(keys, np.float64)):
        D = tokens.shape[1]
        frequencies = kind.rope.theta ** (-np.arange(0, D, 2) / D)
        contents = []
        for place, key in enumerate(tokens):
            turned = (key[: D // 2] + 1j * key[D // 2 :]) * np.exp(-1j * (page * SIZE + place) * frequencies)
            contents.append(np.concatenate([turned.real, turned.imag]))
        pooled = np.concatenate([np.mean(contents, 0), np.max(contents, 0), np.min(contents, 0)])
        mapped = pooled @ np.asarray(score.key[1], np.float64) + np.asarray(score.key_bias[1])
        half = CHANNELS // 2
        turn = np.exp(1j * (page * SIZE + (SIZE - 1) / 2) * np.exp(np.asarray(score.log_frequencies[1])))
        turned = (mapped[:half] + 1j * mapped[half:]) * turn
        found.append(np.concatenate([turned.real, turned.imag]))
    return np.array(found)


def test_the_state_holds_the_summaries_of_its_pages_while_keys_are_overwritten():
    model, tokens = learned(), token_ids(1, 40)
    state = begin(model, CONFIG, tokens, [29])
    state, _ = force(model, CONFIG, state, tokens, 5)  # to 34: a page that has begun, and rewritten ones
    score, kind, layer = model.params.layers[2].page_score, model.config.layers[2], state.layers[2]
    expected = expected_summaries(score, kind, layer.pages[0, 1, :8, 0])
    kept = np.asarray(layer.statistics.at_float32())[0, 1, :8, 0]
    assert layer.statistics.values.shape == (1, 2, 16, 1, CHANNELS)
    np.testing.assert_allclose(kept, expected, atol=np.abs(expected).max() / 250)
    values, there = layer.pages[:, :, 8:9, 0].swapaxes(1, 2), jnp.array([[[True, True, False, False]]])
    values = values.at[..., 2:, :].set(jnp.nan)
    begun = page_summaries(score, model.config, kind, values, there, jnp.array([[8]]))
    np.testing.assert_allclose(
        np.asarray(layer.statistics.at_float32())[:, :, 8, 0], begun[:, 0], atol=np.abs(begun).max() / 250
    )


def test_all_pages_are_full_attention_and_few_are_chosen_by_the_score():
    model, tokens = learned(), token_ids(1, 40)
    full = rj.DecodeConfig("full", sink_pages=0, page_size=SIZE)
    expected = forced_logits(model, full, tokens, [30], 4)
    whole = dataclasses.replace(CONFIG, budget_tokens=40)
    np.testing.assert_allclose(forced_logits(model, whole, tokens, [30], 4), expected, atol=ATOL)
    few = forced_logits(model, CONFIG, tokens, [30], 4)
    others = dataclasses.replace(
        model,
        params=model.params.replace(
            layers=tuple(
                layer.replace(page_score=random_score(9 + index))
                for index, layer in enumerate(model.params.layers)
            )
        ),
    )
    assert np.abs(few - expected).max() > 100 * ATOL
    assert np.abs(few - forced_logits(others, CONFIG, tokens, [30], 4)).max() > 100 * ATOL


def test_verified_text_is_full_attentions():
    model, prompt = learned(), token_ids(1, 30)
    config = dataclasses.replace(CONFIG, method="quest", window=None)
    full = rj.generate(model, prompt.tolist(), rj.DecodeConfig("full", sink_pages=0, page_size=SIZE), 6)
    assert rj.generate(model, prompt.tolist(), config, 6, verify=2).tokens == full.tokens


def test_devices_share_it():
    model, tokens = learned(), token_ids(2, 40)
    state = begin(model, CONFIG, tokens, (29, 36))
    sharded = rj.shard_state(jax.tree.map(jnp.copy, state), model.config, mesh := rj.make_mesh(2, 2))
    spread = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    _, logits = force(model, CONFIG, state, tokens, 2)
    with jax.set_mesh(mesh):
        _, found = force(spread, CONFIG, sharded, tokens, 2)
    np.testing.assert_allclose(found, logits, atol=ATOL)
    assert spread.params.layers[1].page_score.query.sharding.shard_shape((4, 16, 8)) == (2, 16, 8)


MODEL = tiny().config
"""Whose positions alone count here."""


def test_with_all_channels_training_begins_at_mean_keys():
    rng = np.random.default_rng(0)
    kind, (T, N, K, D) = LayerKind(Rope(100.0)), (24, 4, 2, 8)
    q, k = (jnp.asarray(rng.normal(size=(T, heads, D)), jnp.float32) for heads in (N, K))
    score = initial_score(MODEL, kind, q, k, 1, D)  # pages of one token, whose middle it is
    keys = jnp.swapaxes(k.reshape(1, T, 1, K, D), 2, 3)
    summaries = page_summaries(score, MODEL, kind, keys, jnp.ones((1, T, 1), bool), jnp.arange(T)[None])[0]
    queries = learned_queries(score, MODEL, kind, q, jnp.arange(T)).reshape(T, K, N // K, D)
    got = jnp.einsum("tkgd,pkd->tkgp", queries, summaries)
    expected = jnp.einsum("tkgd,pkd->tkgp", q.reshape(T, K, N // K, D), k)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_training_begins_at_the_channels_by_which_pages_differ():
    rng = np.random.default_rng(0)
    kind, D = LayerKind(None), 8
    q, k = (rng.normal(size=(32, heads, D)) for heads in (2, 1))
    k[..., [2, 6]] *= 10
    score = initial_score(MODEL, kind, jnp.float32(q), jnp.float32(k), 4, 2)
    np.testing.assert_array_equal(np.nonzero(np.asarray(score.key[0]))[0], [2, 6])


def test_its_summaries_count_as_the_bytes_that_they_take():
    assert vectors_per_page(CONFIG, 64, 2) == (CHANNELS + 4) / 128
    state = rj.init_state(tiny().config, CONFIG, 1, 64)
    assert state.layers[1].statistics.kind == "mean_key_int8"
    assert STATISTICS["mean_key_int8"].vector_bytes(CHANNELS, 2) == CHANNELS + 4


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({}, "score 'learned' was asked for and the model has none; train one by `retro-jax learn`"),
        ({"page_size": 8}, "page_size is 8, but the model's learned score was trained with 4"),
        ({"score_channels": 6}, "score_channels is 6, but the model's learned score was trained with 8"),
    ),
)
def test_weights_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        rj.generate(learned() if changes else tiny(), [[1, 2, 3]], dataclasses.replace(CONFIG, **changes), 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"score_channels": 7}, "score_channels 7 is not possible; use an even number"),
        ({"residual_pages": 2}, "residual_pages 2 estimates pages by their mean keys, score 'learned'"),
        ({"statistics": "min_max"}, "score 'learned' reads mean_key_int8 statistics, not 'min_max'"),
    ),
)
def test_configurations_that_are_not_possible(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_a_written_model_has_its_learned_score(tmp_path):
    model = learned()
    rj.save_model(model, tmp_path / "model")
    for shardings in (None, rj.params_on(rj.make_mesh(1, 2))):
        found = rj.load_model(str(tmp_path / "model"), shardings=shardings)
        jax.tree.map(np.testing.assert_array_equal, found.params, model.params)
    assert found.params.layers[0].page_score.page_size == model.params.layers[0].page_score.page_size


def test_states_depend_on_a_learned_score_only_where_it_chooses(tmp_path):
    model, plain = learned(), tiny()
    for config, name in ((CONFIG, "learned"), (rj.DecodeConfig("quest", page_size=8), "bounds")):
        state = rj.init_state(model.config, config, 1, 32)
        rj.save_state(model, state, tmp_path / name, config)
    rj.load_state(model, tmp_path / "learned")
    rj.load_state(plain, tmp_path / "bounds")
    with pytest.raises(ValueError, match="learned score or none, see load_score"):
        rj.load_state(plain, tmp_path / "learned")
