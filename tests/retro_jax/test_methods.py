"""Every registered method runs through the same matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import models
import retro_jax as rj
from retro_jax.methods import METHODS
from tests.retro_jax.tiny import ATOL, begin, force, forced_logits, tiny, token_ids

LENGTHS, STEPS = (3, 21), 12


@pytest.fixture(params=sorted(METHODS))
def config(request):
    return rj.DecodeConfig(request.param, page_size=8, budget_tokens=24, dense_layers=1)


def test_a_budget_of_the_whole_context_is_full_attention(config):
    model, tokens = tiny(3), token_ids(2, 60)
    config = rj.DecodeConfig(config.method, page_size=8, budget=1.0, budget_floor=16, dense_layers=1)
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    logits = forced_logits(model, config, tokens, LENGTHS, STEPS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], expected[row, length : length + STEPS], atol=ATOL)


def test_forced_pages_are_loaded_within_the_budget_and_the_rest_are_real_pages(config):
    if METHODS[config.method].dense:
        pytest.skip("a dense method selects nothing")
    model, tokens = tiny(3), token_ids(2, 60)
    loaded = []

    def observe(state):
        for layer in state.layers[1:]:
            loaded.append((np.asarray(state.length) - 1, np.asarray(layer.last_loaded)))

    force(model, config, begin(model, config, tokens, (21, 44), 60)[0], tokens, STEPS, observe)
    for newest, last in loaded:
        chosen = last == newest[:, None, None]  # [B, K, P]
        assert chosen[:, :, 0].all()  # the sink
        for row, position in enumerate(newest):
            assert chosen[row, :, position // 8].all()
            assert not chosen[row, :, position // 8 + 1 :].any()
        assert (chosen.sum(-1) == np.minimum(3, newest // 8 + 1)[:, None]).all()


def test_mean_key_selection_differs_and_is_full_attention_with_a_full_budget():
    model, tokens = tiny(3), token_ids(2, 60)
    fields = {"page_size": 8, "dense_layers": 1, "window": 2}
    bounds = forced_logits(model, rj.DecodeConfig(budget_tokens=24, **fields), tokens, (21, 44), STEPS)
    fields |= {"statistics": "mean_key", "score": "mean_key"}
    mean = forced_logits(model, rj.DecodeConfig(budget_tokens=24, **fields), tokens, (21, 44), STEPS)
    assert np.abs(mean - bounds).max() > 1e-3
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    whole = forced_logits(model, rj.DecodeConfig(budget_tokens=64, **fields), tokens, (21, 44), STEPS)
    np.testing.assert_allclose(whole[:, 1], expected[1, 44 : 44 + STEPS], atol=ATOL)


def test_the_budget_is_a_share_with_a_floor_or_a_number_of_tokens():
    context = jnp.array([1, 320, 1706, 1707, 4096, 131072])
    share = rj.DecodeConfig(budget=0.15, budget_floor=256)
    # 0.15 * 1707 = 256.05 tokens round to 256; 0.15 * 4096 = 614.4 to 614, 39 pages.
    assert share.budget_pages(context).tolist() == [16, 16, 16, 16, 39, 1229]
    assert rj.DecodeConfig(budget_tokens=250).budget_pages(context).tolist() == [16] * 6
    for capacity in range(16, 9000, 97):
        pages = share.num_pages(capacity)
        most = int(share.budget_pages(jnp.array([pages * 16]))[0])
        assert share.max_selected_pages(pages) >= min(most, pages)
