from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import STATISTICS, read_ring, refresh_statistics, settle_blocks
from retro_jax.experiments.bench import contestants
from retro_jax.experiments.bench.contestants import noise_state
from retro_jax.models import LayerKind, Model, ModelConfig, Rope, random_params

B, CONTEXT, CAPACITY = 2, 90, 128
MODEL = ModelConfig("noise", 64, 3, 4, 2, 16, 32, 32, max_positions=CAPACITY)
KINDS = tuple(LayerKind(Rope(), window=window) for window in (20, None, None, None))
MIXED = replace(MODEL, num_layers=4, layer_kinds=KINDS)
CONFIGS = [
    rj.DecodeConfig("full"),
    rj.preset("paper", page_size=8, budget_tokens=32),
    rj.preset("mean-key", page_size=8, residual_pages=2, budget_tokens=32),
]


@pytest.mark.parametrize("model", [MODEL, MIXED], ids=["plain", "windows"])
@pytest.mark.parametrize("config", CONFIGS, ids=["full", "paper", "mean-key"])
def test_noise_is_a_state_like_that_of_a_prompt(model, config, monkeypatch):
    monkeypatch.setattr(contestants, "NOISE_TOKENS", 32)  # several writes, the last of which is not full
    params = random_params(model, jax.random.key(0))
    state = noise_state(Model(model, params, None), config, B, CONTEXT, CAPACITY)
    empty = rj.init_state(model, config, B, CAPACITY)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
    assert state.length.tolist() == [CONTEXT] * B
    begin, written = jnp.zeros(B, jnp.int32), jnp.ones((B, CONTEXT), bool)
    for layer, kind in zip(state.layers, model.layers, strict=True):
        tokens = read_ring(
            layer.pages, begin, CAPACITY if kind.window is None else 20, ring=kind.window or CAPACITY
        )
        there = (np.asarray(tokens) != 0).any(axis=(2, 3, 4))
        assert there.sum(axis=1).tolist() == [CONTEXT if kind.window is None else 20] * B
        assert len(np.unique(np.asarray(tokens)[there][:, 0, 0, 0])) == there.sum()  # no noise is there twice
        if layer.statistics is not None:
            none = STATISTICS[config.kept_statistics].zeros(layer.pages.shape[:3], 16, model.dtype)
            expected = refresh_statistics(none, layer.pages, begin, written)
            jax.tree.map(
                lambda *pair: np.testing.assert_allclose(*pair, atol=1e-5), layer.statistics, expected
            )
        if layer.block_values is not None:
            blocks = settle_blocks(
                jnp.zeros_like(layer.block_values), layer.pages, begin, state.length, block_pages=2, count=6
            )
            assert np.any(blocks)
            np.testing.assert_allclose(layer.block_values, blocks, atol=1e-5)
    _, logits = rj.decode_step(params, model, config, state, jnp.zeros(B, jnp.int32))
    assert np.isfinite(logits).all()
