import importlib

import jax
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from tests.retro_jax.tiny import ATOL, assert_decided, assert_same_tokens, forced_logits, tiny, token_ids


@pytest.mark.parametrize("steps_per_call", (7, 64))
def test_score_with_full_attention_is_the_models_likelihood(steps_per_call):
    model, tokens = tiny(3), token_ids(2, 50)
    config = rj.DecodeConfig("full", page_size=8, prefill_chunk=16)
    result = rj.score(model, tokens, config, prompt_tokens=21, steps_per_call=steps_per_call)
    logits = np.asarray(models.forward(model.params, model.config, tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs[:, 20:-1], tokens[:, 21:, None], axis=-1)[..., 0]
    assert result.nll.shape == (2, 29) and result.nll.dtype == np.float64
    np.testing.assert_allclose(result.nll, expected, atol=ATOL)
    np.testing.assert_allclose(
        rj.score(model, tokens[0], config, prompt_tokens=21).nll, expected[:1], atol=ATOL
    )


def test_score_takes_the_steps_that_generate_takes():
    model = tiny(3)
    config = rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1, window=3)
    prompt = token_ids(1, 40)[0]
    generated = rj.generate(model, [prompt.tolist()], config, 30)
    text = np.concatenate([prompt, generated.tokens[0]])
    result = rj.score(model, text, config, prompt_tokens=40, steps_per_call=9)
    np.testing.assert_array_equal(result.metrics.pages_attended[:29], generated.metrics.pages_attended[:29])
    sparse = rj.score(model, text, rj.DecodeConfig("full"), prompt_tokens=40).nll
    assert np.abs(result.nll - sparse).max() > 1e-3


def test_a_text_of_one_scored_token_has_no_decode_steps():
    result = rj.score(tiny(3), token_ids(1, 12)[0], rj.DecodeConfig(), prompt_tokens=11)
    assert result.nll.shape == (1, 1) and result.metrics is None


def test_progress_counts_tokens():
    stages = []
    config = rj.DecodeConfig("full", page_size=8, prefill_chunk=16)
    rj.score(
        tiny(3),
        token_ids(1, 50)[0],
        config,
        prompt_tokens=21,
        steps_per_call=16,
        progress=lambda *s: stages.append(s),
    )
    assert stages == [("prefill", 16, 21), ("prefill", 21, 21), ("decode", 16, 28), ("decode", 28, 28)]


def test_a_non_finite_logit_is_an_error_that_carries_what_was_done():
    model = tiny(3)
    embed = model.params.embed.at[7].set(np.nan)
    broken = rj.Model(model.config, model.params.replace(embed=embed), None)
    tokens = np.full(30, 3, np.int32)
    tokens[22] = 7
    config = rj.DecodeConfig("full", page_size=8)
    with pytest.raises(rj.NonFiniteLogits, match="sequence 0 are not finite after token 22") as error:
        rj.score(broken, tokens, config, prompt_tokens=10, steps_per_call=4)
    clean = rj.score(model, tokens, config, prompt_tokens=10).nll
    done = error.value.partial.nll
    assert done.shape == (1, 13) and np.isfinite(done).all()
    np.testing.assert_allclose(done, clean[:, :13], atol=ATOL)
    with pytest.raises(rj.NonFiniteLogits, match="after the prompt"):
        rj.score(broken, tokens, config, prompt_tokens=25)


def test_generation_stops_at_a_non_finite_logit_with_the_tokens_so_far():
    model = tiny(3)
    config = rj.DecodeConfig("full", page_size=8)
    clean = rj.generate(model, [[1, 2, 3]], config, 12)
    poison = clean.tokens[0][4]
    assert poison not in [1, 2, 3, *clean.tokens[0][:4]]
    embed = model.params.embed.at[poison].set(jax.numpy.nan)
    broken = rj.Model(model.config, model.params.replace(embed=embed), None)
    with pytest.raises(rj.NonFiniteLogits, match="sequence 0 are not finite after 5 new tokens") as error:
        rj.generate(broken, [[1, 2, 3]], config, 12, steps_per_call=3)
    done = error.value.partial.tokens[0]
    assert done == clean.tokens[0][: len(done)] and len(done) == 5


def test_texts_of_different_lengths_score_as_alone():
    model, tokens = tiny(3), token_ids(3, 60)
    config = rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1, window=3, prefill_chunk=16)
    rows, prompts = [tokens[0, :50], tokens[1, :33], tokens[2, :41]], (20, 29, 40)
    result = rj.score(model, rows, config, prompt_tokens=prompts, steps_per_call=8)
    assert result.nll.shape == result.hits.shape == (3, 30)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = rj.score(model, row, config, prompt_tokens=prompt, capacity=64, steps_per_call=8)
        count = len(row) - prompt
        np.testing.assert_allclose(result.nll[index, :count], alone.nll[0], atol=ATOL)
        np.testing.assert_array_equal(result.hits[index, :count], alone.hits[0])
        assert np.isnan(result.nll[index, count:]).all() and not result.hits[index, count:].any()


def test_texts_with_budgets_of_their_own_score_as_alone():
    model, tokens = tiny(3), np.repeat(token_ids(1, 60), 2, axis=0)
    fields = {"page_size": 8, "dense_layers": 1, "window": 3, "prefill_chunk": 16}
    configs = [rj.DecodeConfig(budget_tokens=n, **fields) for n in (24, 40)]
    result = rj.score(model, tokens, configs, prompt_tokens=40)
    for index, config in enumerate(configs):
        alone = rj.score(model, tokens[0], config, prompt_tokens=40)
        np.testing.assert_allclose(result.nll[index], alone.nll[0], atol=ATOL)
        own = result.of(slice(index, index + 1)).metrics
        np.testing.assert_allclose(own.kv_bytes, alone.metrics.kv_bytes)
    assert np.abs(result.nll[0] - result.nll[1]).max() > 1e-4
    with pytest.raises(ValueError, match="1 configurations were given for 2 texts; give one for each"):
        rj.score(model, tokens, configs[:1], prompt_tokens=40)
    other = rj.DecodeConfig(budget_tokens=24, **fields | {"window": 2})
    with pytest.raises(ValueError, match=r"window=2.* may differ in their budgets only"):
        rj.score(model, tokens, [configs[0], other], prompt_tokens=40)


def test_hits_are_the_tokens_that_greedy_decoding_would_choose():
    model, config = tiny(3), rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1)
    prompt = token_ids(1, 40)[0]
    chosen = np.array(rj.generate(model, [prompt], config, 12).tokens[0], np.int32)
    assert_decided(forced_logits(model, config, np.concatenate([prompt, chosen])[None], [40], 11))
    assert rj.score(model, np.concatenate([prompt, chosen]), config, prompt_tokens=40).hits.all()
    chosen[5] = (chosen[5] + 1) % 96
    hits = rj.score(model, np.concatenate([prompt, chosen]), config, prompt_tokens=40).hits[0]
    assert hits[:5].all() and not hits[5]


def test_under_a_mesh():
    model, tokens = tiny(3), token_ids(4, 50)
    config = rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1, prefill_chunk=16)
    prompts = [row[: 20 + 3 * index] for index, row in enumerate(tokens)]
    capacity = 50  # one for both, so that the prefill is compiled once
    expected = rj.score(model, tokens, config, prompt_tokens=21, capacity=capacity).nll
    generated = rj.generate(model, prompts, config, 8, capacity=capacity).tokens
    mesh = rj.make_mesh(2, 2)
    with jax.set_mesh(mesh):
        sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
        np.testing.assert_allclose(
            rj.score(sharded, tokens, config, prompt_tokens=21, capacity=capacity).nll, expected, atol=ATOL
        )
        result = rj.generate(sharded, prompts, config, 8, capacity=capacity)
        for prompt, *both in zip(prompts, result.tokens, generated, strict=True):
            assert_same_tokens(model, config, prompt, *both)
        assert len(result.state.layers[0].pages.sharding.device_set) == 4
        three = rj.score(sharded, tokens[:3], config, prompt_tokens=21, capacity=capacity)
        np.testing.assert_allclose(three.nll, expected[:3], atol=ATOL)


def test_short_texts_take_short_programs(monkeypatch):
    module, shapes = importlib.import_module("retro_jax.score"), []
    forced = module._teacher_force

    def recorded(params, model, config, state, tokens, *rest):
        shapes.append(tokens.shape)
        return forced(params, model, config, state, tokens, *rest)

    monkeypatch.setattr(module, "_teacher_force", recorded)
    model, tokens = tiny(3), token_ids(3, 20)
    result = rj.score(model, tokens, rj.DecodeConfig(page_size=8, dense_layers=1), prompt_tokens=10)
    assert shapes == [(4, 16)]
    assert result.nll.shape == (3, 10) and result.metrics.kv_bytes.shape == (16, 3)
    assert result.metrics.summary()["steps"] == 27
