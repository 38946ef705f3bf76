import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.prompts import _extend
from retro_jax.sampling import sample, sequence_keys
from tests.retro_jax.tiny import assert_decided, assert_same_tokens, forced_logits, tiny, token_ids

generate_module = importlib.import_module("retro_jax.generate")  # the package exports a function of this name
CONFIG = rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1, prefill_chunk=16)
FULL = rj.DecodeConfig("full", page_size=8, prefill_chunk=16)


class Letters:
    """A tokenizer whose token i is the letter i; 0 ends a text."""

    stop_ids = (0,)
    bos_id = None

    def encode(self, text, add_bos=None):
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids)


@pytest.fixture(scope="module")
def model():
    return rj.Model(tiny(3).config, tiny(3).params, Letters())


def greedy(model, ids, steps):
    """Greedy continuation by plain dense attention over everything, again and again."""
    ids = list(ids)
    for _ in range(steps):
        padded = np.array([ids + [0] * (64 - len(ids))], np.int32)  # causal: what follows does not matter
        ids.append(int(np.argmax(models.forward(model.params, model.config, padded)[0, len(ids) - 1])))
    return ids[-steps:]


def test_ragged_greedy_generation_with_full_attention(model):
    prompts = [row[:length].tolist() for row, length in zip(token_ids(3, 37), (2, 13, 37), strict=True)]
    result = rj.generate(model, prompts, FULL, 20, stop_tokens=[])
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert_same_tokens(model, FULL, prompt, tokens, greedy(model, prompt, 20))
    assert result.texts == [model.tokenizer.decode(tokens) for tokens in result.tokens]
    assert result.finished == [False] * 3


def test_each_sequence_ends_at_its_own_stop_token_and_alone_gives_the_same(model):
    prompts = [row.tolist() for row in token_ids(3, 9, seed=5)]
    free = rj.generate(model, prompts, CONFIG, 24, stop_tokens=[])
    texts = np.concatenate([prompts, free.tokens], axis=1).astype(np.int32)
    assert_decided(forced_logits(model, CONFIG, texts, [9] * 3, 23))
    stop = free.tokens[1][7]
    result = rj.generate(model, prompts, CONFIG, 24, stop_tokens=[stop], steps_per_call=5)
    for tokens, unstopped, text, finished in zip(
        result.tokens, free.tokens, result.texts, result.finished, strict=True
    ):
        end = unstopped.index(stop) + 1 if stop in unstopped else 24
        assert tokens == unstopped[:end] and finished == (stop in unstopped)
        assert text == model.tokenizer.decode(tokens[: end - 1] if finished else tokens)
    assert result.finished[1] and len(result.tokens[1]) <= 8
    assert np.asarray(result.state.length)[:3].tolist() == [9 + len(tokens) - 1 for tokens in result.tokens]
    alone = rj.generate(model, prompts[2:], CONFIG, 24, stop_tokens=[stop])
    assert alone.tokens[0] == result.tokens[2]


def test_streamed_pieces_join_to_the_text_and_progress_counts_tokens(model):
    pieces, stages = ["", ""], []
    result = rj.generate(
        model,
        ["hello there", "a longer prompt than one chunk"],
        CONFIG,
        21,
        stop_tokens=[],
        stream=lambda index, piece: pieces.__setitem__(index, pieces[index] + piece),
        progress=lambda *stage: stages.append(stage),
        steps_per_call=4,
    )
    assert pieces == result.texts and len(result.texts[0]) == 21
    assert stages[:2] == [("prefill", 16, 30), ("prefill", 30, 30)]
    assert stages[2:] == [("decode", done, 21) for done in (5, 9, 13, 17, 21)]


def test_turns_on_one_state_equal_one_long_prompt(model):
    first = rj.generate(model, ["abc", "defghij"], FULL, 6, stop_tokens=[], capacity=64)
    second = rj.generate(model, ["xy", "stuvw"], FULL, 5, stop_tokens=[], previous=first)
    third = rj.generate(model, ["12", "3"], FULL, 4, stop_tokens=[], previous=second)
    for row, turns in enumerate((("abc", "xy", "12"), ("defghij", "stuvw", "3"))):
        history = []
        for turn, result in zip(turns, (first, second, third), strict=True):
            history += model.tokenizer.encode(turn)
            tokens = result.tokens[row]
            assert_same_tokens(model, FULL, history, tokens, greedy(model, history, len(tokens)))
            history += result.tokens[row]


def test_a_new_turn_empties_the_window(model):
    first = rj.generate(model, ["abcdefgh"], CONFIG, 12, stop_tokens=[], capacity=64)
    before = {index: np.asarray(layer.pages) for index, layer in enumerate(first.state.layers)}
    assert first.state.decoded.tolist() == [3]
    second = rj.generate(model, ["xyz"], CONFIG, 1, stop_tokens=[], previous=first)
    assert second.state.decoded.tolist() == [0] and second.metrics is None
    length = 8 + 11  # what the first turn left in the cache; prefill does not touch it
    for index, layer in enumerate(second.state.layers):
        old, new = before[index], np.asarray(layer.pages)
        np.testing.assert_array_equal(new[:, :, : length // 8], old[:, :, : length // 8])


@pytest.mark.parametrize("mode", (dict(), dict(top_k=5), dict(top_p=0.6), dict(top_k=20, top_p=0.9)))
def test_sampling_follows_the_distribution(mode):
    logits = jax.random.normal(jax.random.key(1), (1, 12)) * 2
    sampling = rj.Sampling(temperature=0.7, **mode)
    draws = 4000
    keys = jnp.repeat(sequence_keys(sampling, 1), draws)
    tokens = sample(jnp.repeat(logits, draws, axis=0), sampling, keys, jnp.arange(draws))
    expected = np.exp(np.asarray(logits[0], np.float64) / 0.7)
    expected /= expected.sum()
    order = np.argsort(-expected)
    if "top_k" in mode:
        expected[order[mode["top_k"] :]] = 0
        expected /= expected.sum()
    if "top_p" in mode:
        kept = int(np.sum(np.cumsum(expected[order]) - expected[order] < mode["top_p"]))
        expected[order[kept:]] = 0
        expected /= expected.sum()
    counts = np.bincount(np.asarray(tokens), minlength=12) / draws
    assert np.all(counts[expected == 0] == 0)
    np.testing.assert_allclose(counts, expected, atol=0.035)  # four standard deviations of 4000 draws


def test_sampling_is_reproducible_whatever_the_steps_per_call_and_the_batch(model):
    prompts = [row.tolist() for row in token_ids(2, 9)]
    sampling = rj.Sampling(temperature=1.0, seed=3)
    options = {"sampling": sampling, "stop_tokens": []}
    whole = rj.generate(model, prompts, CONFIG, 15, **options)
    often = rj.generate(model, prompts, CONFIG, 15, steps_per_call=4, **options)
    alone = rj.generate(model, prompts[:1], CONFIG, 15, **options)
    keys = sequence_keys(sampling, 2)
    for row, tokens in ((0, often.tokens[0]), (1, often.tokens[1]), (0, alone.tokens[0])):
        assert_same_tokens(model, CONFIG, prompts[row], tokens, whole.tokens[row], sampling, keys[row])
    other = rj.generate(model, prompts, CONFIG, 15, sampling=rj.Sampling(1.0, seed=4), stop_tokens=[])
    assert whole.tokens != other.tokens
    assert rj.generate(model, prompts, CONFIG, 5, sampling=rj.Sampling(1.0, top_k=1)).tokens == (
        rj.generate(model, prompts, CONFIG, 5).tokens
    )


def test_metrics_of_a_generation(model):
    result = rj.generate(model, [token_ids(1, 60)[0].tolist()], CONFIG, 41, stop_tokens=[])
    summary = result.metrics.summary()
    assert summary["steps"] == 40 and summary["pages_loaded"] == 3.0
    exposure = summary["exposure"]
    assert exposure[0] == 1.0 and all(a <= b for a, b in itertools.pairwise(exposure))
    assert exposure[-1] > 1.0
    # Float32; 2 KV heads of 16 channels; one dense layer, two sparse ones with 3 pages of 8 and bounds.
    context = np.arange(61, 101)
    vectors = 2 * context + 2 * (3 * 8 * 2 + 2 * -(-context // 8))
    np.testing.assert_array_equal(result.metrics.kv_bytes[:40, 0], vectors * 2 * 16 * 4)
    full = rj.generate(model, [[1, 2, 3]], FULL, 5, stop_tokens=[]).metrics.summary()
    assert full["exposure"] == [None] and full["pages_loaded"] == 0


def test_a_sequence_with_its_own_key_samples_the_same_in_any_batch():
    model, prompts = tiny(3), [row.tolist() for row in token_ids(3, 20)]
    sampling = rj.Sampling(temperature=1.0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.array([70, 71, 72]))
    together = rj.generate(model, prompts, CONFIG, 12, sampling=sampling, keys=keys).tokens
    backward = rj.generate(model, prompts[::-1], CONFIG, 12, sampling=sampling, keys=keys[::-1]).tokens
    for prompt, tokens, expected, key in zip(prompts, backward[::-1], together, keys, strict=True):
        assert_same_tokens(model, CONFIG, prompt, tokens, expected, sampling, key)
    assert rj.generate(model, prompts, CONFIG, 12, sampling=sampling).tokens != together


def test_three_prompts_and_four_of_other_lengths_are_one_program():
    model, prompts = (
        tiny(3),
        [row[:length].tolist() for row, length in zip(token_ids(4, 9), (2, 9, 5, 7), strict=True)],
    )
    config = dataclasses.replace(CONFIG, score_seed=1)  # no other test has compiled its program
    before = generate_module._decode._cache_size()
    rj.generate(model, prompts, config, 21, stop_tokens=[])  # two calls of `decode`
    assert generate_module._decode._cache_size() - before == 1
    programs = [_extend._cache_size(), generate_module._decode._cache_size()]
    result = rj.generate(model, prompts[:3], config, 21, stop_tokens=[])
    assert [_extend._cache_size(), generate_module._decode._cache_size()] == programs
    assert len(result.texts) == len(result.tokens) == len(result.finished) == len(result.pending) == 3
    assert result.metrics.kv_bytes.shape == (32, 3) and result.metrics.summary()["steps"] == 60
    assert result.state.length.tolist() == [22, 29, 25, 0]  # the row after the sequences stays empty
    later = rj.generate(model, [[1], [2], [3]], config, 2, stop_tokens=[], previous=result)
    assert later.state.length.tolist() == [25, 32, 28, 0]
    alone = rj.generate(model, prompts[:1], config, 21, stop_tokens=[])
    assert alone.tokens[0] == result.tokens[0]


def test_keys_are_one_for_each_prompt():
    with pytest.raises(ValueError, match=r"keys has shape \(2,\), not \(3,\): one for each sequence"):
        rj.generate(tiny(3), [[1], [2], [3]], CONFIG, 2, keys=sequence_keys(rj.Sampling(), 2))
