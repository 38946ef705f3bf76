"""SmolLM2 through the decode path, beside Hugging Face transformers on the same weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels

import retro_jax as rj
from retro_jax import models
from tests.models import golden
from tests.retro_jax.tiny import prefill, step


@pytest.mark.parametrize("method", ("full", "retro"))
def test_prefill_and_64_decode_steps_match_transformers(smollm2, method):
    expected = golden.smollm2()
    # With a budget of everything the retrospective path must give the same logits.
    config = rj.DecodeConfig("full") if method == "full" else rj.DecodeConfig(budget_tokens=1024)
    tokens = jnp.asarray(expected.tokens[None], jnp.int32)
    start = expected.positions[expected.positions < expected.prompt_tokens].max() + 1
    state, logits = prefill(
        smollm2.params, smollm2.config, config, tokens[:, :start], jnp.array([start]), capacity=1024
    )
    expected.assert_matches(np.asarray(logits), start=start - 1, atol=1e-3)
    decoded = []
    for position in range(start, tokens.shape[1]):
        state, logits = step(smollm2.params, smollm2.config, config, state, tokens[:, position])
        decoded.append(np.asarray(logits[0]))
    assert len(decoded) >= 64
    expected.assert_matches(np.stack(decoded), start=start, atol=1e-3)


def test_sparse_attention_loses_likelihood_and_retro_attention_less(smollm2):
    ids = np.array(smollm2.tokenizer.encode(golden.EXCERPT.read_text())[:768]).reshape(3, 256)[:, :216]
    prompt = 96

    def mean_nll(method, **fields):
        config = rj.DecodeConfig(method, budget_tokens=48, page_size=8, sink_pages=0, **fields)
        return rj.score(smollm2, ids, config, prompt_tokens=prompt).nll.mean()

    logits = models.forward(smollm2.params, smollm2.config, jnp.asarray(ids))[:, prompt - 1 : -1]
    full = softmax_cross_entropy_with_integer_labels(logits, ids[:, prompt:]).mean()
    quest, retro = mean_nll("quest"), mean_nll("retro", window=8)
    assert full + 0.05 < quest
    assert full + 0.9 * (quest - full) > retro > full
