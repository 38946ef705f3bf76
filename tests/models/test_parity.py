import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.models.formats.weights import separate_weights
from retro_jax.models.presets import SIZES
from retro_jax.models.rope import apply_rope, rope_frequencies
from tests.models import golden

SOURCES = [*golden.FAMILIES, *golden.GGUF_FILES]
BOTH_FORMATS = [path for path in golden.GGUF_FILES if path.with_suffix("").is_dir()]
ONCE = [path for path in SOURCES if path not in BOTH_FORMATS]
"""Without the files that hold the weights of a folder, bit for bit."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_logits_equal_transformers(path):
    model, expected = models.load_model(str(path), dtype="float32"), golden.tiny(path)
    fit = slice(model.config.max_positions)
    logits = models.forward(model.params, model.config, jnp.asarray(expected.tokens[:, fit]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.logits[:, fit], rtol=0, atol=1e-4)


@functools.partial(jax.jit, static_argnames=("model", "config", "prompt"))
def decoded(params, model, config, tokens, prompt):
    """Logits [steps, V] of steps along the tokens after a prompt."""
    prompts, lengths = tokens[:, :prompt], jnp.array([prompt])
    state, _ = rj.prefill(params, model, config, prompts, lengths, capacity=tokens.shape[1])

    def step(state, token):
        state, logits = rj.decode_step(params, model, config, state, token[None])
        return state, logits[0]

    return jax.lax.scan(step, state, tokens[0, prompt:])[1]


@pytest.mark.parametrize("path", golden.FAMILIES, ids=lambda path: path.name)
def test_steps_equal_transformers(path):
    """Prefill of 9 tokens and 64 decode steps, beyond every window; rings serve the past query, too."""
    model, expected = models.load_model(str(path), dtype="float32"), golden.tiny(path)
    windows = [kind.window for kind in model.config.layers if kind.window is not None]
    config = rj.DecodeConfig("full", page_size=8)
    if windows:
        assert max(windows) < 32
        config = rj.DecodeConfig("retro", window=2, page_size=8, budget_tokens=128, dense_layers=0)
    logits = decoded(model.params, model.config, config, jnp.asarray(expected.tokens), 9)
    assert len(logits) == 64
    np.testing.assert_allclose(logits, expected.logits[0, 9:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ONCE, ids=lambda path: path.name)
def test_bfloat16_stays_near_float32(path):
    model, expected = models.load_model(str(path), dtype="bfloat16"), golden.tiny(path)
    dtypes = {name: weight.dtype for name, weight in separate_weights(model.params, model.config).items()}
    own = {"float32"} if model.config.float32_norms else {"bfloat16"}
    assert {str(dtype) for name, dtype in dtypes.items() if name.endswith("norm")} == own
    assert {str(dtype) for name, dtype in dtypes.items() if not name.endswith("norm")} == {"bfloat16"}
    fit = slice(model.config.max_positions)
    logits = models.forward(model.params, model.config, jnp.asarray(expected.tokens[:, fit]))
    # Rounding to 8 bits in each of some 20 operations, on logits of order one.
    assert np.abs(logits - expected.logits[:, fit]).mean() < 0.05


@pytest.mark.parametrize("path", BOTH_FORMATS, ids=lambda path: path.name)
def test_both_formats_are_one_model(path):
    """In all that a file says, and in weights; bfloat16 takes nothing off norms that are stored less one."""
    file, folder = (
        models.load_model(str(source), dtype="bfloat16") for source in (path, path.with_suffix(""))
    )
    assert file.config == folder.config
    jax.tree.map(np.testing.assert_array_equal, file.params, folder.params)


def test_longrope_of_a_model_for_no_more_than_its_first_positions():
    """The golden is of the factors beyond; both by the formula, and the rest of a head is not turned."""
    config = models.load_model(str(golden.FOLDER / "phi3")).config
    rope, first = config.layers[0].rope, config.layers[0].rope.scaling.original_positions
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 1, 16), np.float32))
    positions = jnp.array([[0, 5, 11]])
    plain = 10_000.0 ** -(np.arange(6) / 6)
    for limit, factors in ((first, rope.scaling.short_factors), (first + 1, rope.scaling.factors)):
        angles = np.asarray(positions)[0, :, None] * plain / factors
        turned = (np.asarray(x)[0, :, 0, :6] + 1j * np.asarray(x)[0, :, 0, 6:12]) * 1.5 * np.exp(1j * angles)
        expected = np.concatenate([turned.real, turned.imag, np.asarray(x)[0, :, 0, 12:]], axis=-1)
        np.testing.assert_allclose(apply_rope(x, positions, rope, limit)[0, :, 0], expected, atol=1e-5)


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
