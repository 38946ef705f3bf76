import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax import models
from retro_jax.models.presets import SIZES
from retro_jax.models.rope import rope_frequencies
from tests.models import golden

SOURCES = [*golden.FAMILIES, *golden.GGUF_FILES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_logits_equal_transformers(path):
    model, expected = models.load_model(str(path), dtype="float32"), golden.tiny(path)
    logits = models.forward(model.params, model.config, jnp.asarray(expected.tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_bfloat16_stays_near_float32(path):
    model, expected = models.load_model(str(path), dtype="bfloat16"), golden.tiny(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    logits = models.forward(model.params, model.config, jnp.asarray(expected.tokens))
    # Rounding to 8 bits in each of some 20 operations, on logits of order one.
    assert np.abs(logits - expected.logits).mean() < 0.05


def test_smollm2_equals_transformers(smollm2):
    expected = golden.smollm2()
    logits = models.forward(smollm2.params, smollm2.config, jnp.asarray(expected.tokens)[None])
    expected.assert_matches(np.asarray(logits[0]), start=0, atol=1e-3)


def test_smollm2_configuration(smollm2):
    assert smollm2.config == models.ModelConfig(
        name="smollm2-135m",
        vocab_size=49152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        width=576,
        hidden_width=1536,
        max_positions=8192,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    assert smollm2.config.group == 3


@pytest.fixture(scope="module")
def tiny() -> models.Model:
    return models.load_model(str(golden.FOLDER / "qwen3"))


def test_the_pieces_join_at_any_positions(tiny):
    """Keys and queries shifted by the same positions give the same attention."""
    params, config = tiny.params, tiny.config
    x = models.embed(params, config, jnp.arange(12)[None])
    positions = jnp.arange(12)[None]
    scores = []
    for shift in (0, 37):
        q, k, _ = models.qkv(params.layers[0], config, config.layers[0], x, positions + shift)
        scores.append(jnp.einsum("btkgd,bskd->btskg", q.reshape(1, 12, 2, 2, -1), k))
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-5)
    assert np.abs(scores[0]).max() > 1


def test_a_token_does_not_see_later_ones(tiny):
    tokens = jnp.arange(20)[None]
    short = models.forward(tiny.params, tiny.config, tokens[:, :11])
    long = models.forward(tiny.params, tiny.config, tokens)
    np.testing.assert_allclose(short, long[:, :11], atol=1e-5)


def test_yarn_with_truncation_off_and_own_attention_factor():
    """The numbers of the formula in the paper, worked out for four channels."""
    scaling = models.RopeScaling(
        "yarn", factor=4.0, original_positions=64, beta_fast=4.0, beta_slow=1.0, truncate=False
    )
    config = dataclasses.replace(SIZES["tiny"], head_dim=8, rope_scaling=scaling)
    frequencies, attention_factor = rope_frequencies(config.layers[0].rope, config.head_dim, 256)
    low, high = (4 * np.log(64 / (turns * 2 * np.pi)) / np.log(10_000) for turns in (4.0, 1.0))
    divided = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    plain = 10_000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(frequencies, plain * (1 - divided + divided / 4), rtol=1e-6)
    assert attention_factor == pytest.approx(1 + 0.1 * np.log(4.0))
    stated = models.Rope(scaling=dataclasses.replace(scaling, attention_factor=1.5))
    assert rope_frequencies(stated, 8, 256)[1] == 1.5


def test_random_weights_are_seeded_and_sane():
    first, same, other = (models.load_model("random:tiny", seed=seed) for seed in (3, 3, 4))
    tokens = jnp.arange(64)[None]
    logits = [models.forward(model.params, model.config, tokens) for model in (first, same, other)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.1
    assert 0.5 < float(jnp.std(logits[0])) < 2.0
    assert first.tokenizer is None
