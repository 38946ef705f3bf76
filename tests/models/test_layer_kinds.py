import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax import models
from retro_jax.models import Experts, LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.transformer import causal_attention
from tests.models import golden

SIZES = {
    "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "width": 8, "hidden_width": 8, "max_positions": 8
}  # fmt: skip
TOKENS = jnp.arange(12)[None]


@pytest.fixture(scope="module")
def tiny() -> models.Model:
    return models.load_model(str(golden.FOLDER / "qwen3"))


def logits(model: models.Model, *kinds: LayerKind) -> np.ndarray:
    config = dataclasses.replace(model.config, rope_theta=10_000.0, rope_scaling=None, layer_kinds=kinds)
    return np.asarray(models.forward(model.params, config, TOKENS))


def test_layers_of_one_kind_are_made_of_the_rope():
    scaling = RopeScaling("linear", factor=2.0)
    config = ModelConfig("m", 8, 3, 1, 1, 8, 8, 8, 8, rope_theta=5.0, rope_scaling=scaling)
    assert config.layers == (LayerKind(Rope(5.0, scaling)),) * 3
    assert len(dataclasses.replace(config, num_layers=2).layers) == 2
    assert hash(config.layers[0]) == hash(LayerKind(Rope(5.0, scaling)))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ({}, {"num_layers": 2}, "1 layer_kinds for num_layers 2"),
        ({}, {"rope_theta": 5.0}, r"rope_theta 5\.0 stands beside layer_kinds"),
        ({}, {"rope_scaling": RopeScaling("linear")}, "rope_scaling .* stands beside layer_kinds"),
        (
            {"rope": (10.0, RopeScaling("factors", factors=(1.0,)))},
            {},
            r"has 1 factors, 8 rotary channels \(head_dim 8\) need 4",
        ),
        (
            {"rope": (10.0, RopeScaling("longrope", original_positions=4, factors=(1.0,) * 3), 6)},
            {},
            r"has 0 factors, 6 rotary channels \(head_dim 8\) need 3",
        ),
        ({"rope": (0.0,)}, {}, r"rope_theta must be positive, got 0\.0"),
        ({"rope": (1.0, None, 3)}, {}, "rotary channels must be positive and even, got 3"),
        ({"rope": (1.0, None, 10)}, {}, "10 rotary channels are more than head_dim 8"),
        ({"window": 0}, {}, "window of a layer must be positive, got 0"),
        ({"scale": -1.0}, {}, r"scale of a layer must be positive, got -1\.0"),
        ({"mlp": "wobble"}, {}, "mlp 'wobble' is not supported; use one of dense, experts"),
        ({"mlp": "experts"}, {}, "experts None and layers with mlp 'experts' belong together"),
        ({}, {"experts": Experts(2, 1, 8)}, "mlp 'experts' belong together; give both or neither"),
        ({"soft_cap": 0.0}, {}, r"soft_cap of a layer must be positive, got 0\.0"),
    ],
)
def test_bad_kinds(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        if "rope" in kind:
            kind = {"rope": Rope(*kind["rope"])}
        ModelConfig("m", 8, **{"num_layers": 1} | fields, layer_kinds=(LayerKind(**kind),), **SIZES)


def test_kinds_of_every_layer_count(tiny):
    """Stated one by one they are what one rope for all is, and each layer follows its own."""
    rope = tiny.config.layers[0].rope
    plain = models.forward(tiny.params, tiny.config, TOKENS)
    np.testing.assert_array_equal(logits(tiny, LayerKind(rope), LayerKind(rope)), plain)
    for kinds in ((LayerKind(None), LayerKind(rope)), (LayerKind(rope), LayerKind(rope, window=2))):
        assert np.abs(logits(tiny, *kinds) - plain).max() > 1e-3, kinds


def test_without_a_rope_tokens_are_not_rotated(tiny):
    x = models.embed(tiny.params, tiny.config, TOKENS)
    near, far = (
        models.qkv(tiny.params.layers[0], tiny.config, LayerKind(None), x, TOKENS + shift)
        for shift in (0, 37)
    )
    for one, other in zip(near, far, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_scale_is_that_of_the_products(tiny):
    """A scale four times the usual is a query norm of four times the weight."""
    louder = [layer.replace(q_norm=layer.q_norm * 4) for layer in tiny.params.layers]
    louder = dataclasses.replace(tiny, params=tiny.params.replace(layers=tuple(louder)))
    rope, usual = tiny.config.layers[0].rope, tiny.config.head_dim**-0.5
    scaled = logits(tiny, *[LayerKind(rope, scale=4 * usual)] * 2)
    np.testing.assert_allclose(scaled, models.forward(louder.params, tiny.config, TOKENS), atol=1e-5)


def test_a_soft_cap_bounds_the_scores():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 7, 2, 4), np.float32))
    scores = 0.7 * np.tanh(np.einsum("btnd,bsnd->bnts", q, k) / 2 / 0.7)
    weights = np.exp(scores) * np.tri(7)
    expected = np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(causal_attention(q, k, v, soft_cap=0.7), expected, atol=1e-5)


def test_a_window_is_the_latest_tokens():
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 7, 2, 4), np.float32))
    o = causal_attention(q, k, v, window=3)
    scores = np.einsum("btnd,bsnd->bnts", q, k) / 2
    token, key = np.ogrid[:7, :7]
    weights = np.exp(scores) * ((key <= token) & (key > token - 3))
    expected = np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(o, expected, atol=1e-5)
    np.testing.assert_array_equal(causal_attention(q, k, v, window=7), causal_attention(q, k, v))


def test_sinks_are_keys_without_values():
    """A head's sink is a key whose product with every query is the logit, and whose value is zero."""
    q, k, v = (jax.random.normal(key, (1, 6, 4, 8)) for key in jax.random.split(jax.random.key(3), 3))
    sinks = jnp.array([-2.0, 0.0, 1.0, 5.0])
    scores = np.asarray(jnp.einsum("btnd,bsnd->bnts", q, k), np.float64) * 8**-0.5
    weights = np.exp(np.where(np.tril(np.ones((6, 6), bool)), scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(np.asarray(sinks))[:, None, None]
    expected = np.einsum("bnts,bsnd->btnd", weights, v)
    np.testing.assert_allclose(causal_attention(q, k, v, sinks=sinks), expected, atol=1e-5)


def test_layers_with_sinks_have_weights_for_them(tiny):
    rope = tiny.config.layers[0].rope
    kinds = (LayerKind(rope), LayerKind(rope, sinks=True))
    config = dataclasses.replace(tiny.config, rope_theta=10_000.0, rope_scaling=None, layer_kinds=kinds)
    plain = models.random_params(tiny.config, jax.random.key(0))
    with_sinks = models.random_params(config, jax.random.key(0))
    assert with_sinks.layers[0].sinks is None
    assert with_sinks.layers[1].sinks.shape == (config.num_heads,)
    np.testing.assert_array_equal(with_sinks.layers[1].wo, plain.layers[1].wo)
    assert (
        np.abs(models.forward(with_sinks, config, TOKENS) - models.forward(plain, config, TOKENS)).max()
        > 1e-3
    )
