"""Log-probabilities of generated tokens are those of the model's whole distribution."""

import jax
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.decode import all_finite, negative_log_likelihood
from tests.retro_jax.test_texts import Letters
from tests.retro_jax.tiny import ATOL, tiny, token_ids

MODEL = rj.Model(tiny(3, layers=2).config, tiny(3, layers=2).params, Letters())
FULL = rj.DecodeConfig("full", page_size=8, prefill_chunk=16)
QUEST = rj.DecodeConfig("quest", page_size=8, budget_tokens=16, dense_layers=0, prefill_chunk=16)
DRAWN = rj.Sampling(temperature=0.6, top_k=8, seed=3)
PROMPTS = [row[:length].tolist() for row, length in zip(token_ids(2, 23), (5, 23), strict=True)]


def expected(prompt, tokens):
    """By plain dense attention over the whole text."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    logits = models.forward(MODEL.params, MODEL.config, padded)[0, len(prompt) - 1 :]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize(
    ("config", "verify"), ((FULL, None), (QUEST, 3)), ids=("full attention", "verified decoding")
)
def test_they_are_of_full_attention_at_temperature_1_whatever_the_sampling(config, verify):
    made = rj.generate(MODEL, PROMPTS, config, 12, sampling=DRAWN, stop_tokens=[], verify=verify)
    for prompt, tokens, logprobs in zip(PROMPTS, made.tokens, made.logprobs, strict=True):
        np.testing.assert_allclose(logprobs, expected(prompt, tokens), atol=10 * ATOL)
    later = rj.generate(MODEL, None, config, 3, sampling=DRAWN, stop_tokens=[], previous=made, verify=verify)
    for prompt, before, tokens, logprobs in zip(
        PROMPTS, made.tokens, later.tokens, later.logprobs, strict=True
    ):
        np.testing.assert_allclose(logprobs, expected([*prompt, *before], tokens), atol=10 * ATOL)


def test_tokens_behind_a_stop_string_have_none():
    free = rj.generate(MODEL, PROMPTS, QUEST, 12, stop_tokens=[], verify=3)
    stop = free.texts[1][3:5]
    made = rj.generate(MODEL, PROMPTS, QUEST, 12, stop_tokens=[], stop=[stop], verify=3)
    assert made.finished[1] and len(made.tokens[1]) < 12
    for whole, tokens, logprobs in zip(free.logprobs, made.tokens, made.logprobs, strict=True):
        assert len(logprobs) == len(tokens)
        np.testing.assert_allclose(logprobs, whole[: len(tokens)], atol=10 * ATOL)


def test_only_tokens_have_a_likelihood():
    logits = np.log(np.array([[1.0, 2, 5]] * 4, np.float32))
    nll = negative_log_likelihood(jax.numpy.asarray(logits), jax.numpy.array([0, 2, 3, -1]))
    np.testing.assert_allclose(nll, [np.log(8), np.log(8 / 5), np.nan, np.nan], rtol=1e-6)


def test_one_logit_that_is_not_finite_is_found():
    logits = np.zeros((4, 3), np.float32)
    logits[[1, 2, 3], [0, 1, 2]] = np.nan, np.inf, -np.inf
    assert all_finite(jax.numpy.asarray(logits)).tolist() == [True, False, False, False]
