"""Matrices that lie in one: each device's columns, and the way back to a checkpoint's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.models import ModelConfig, qkv, random_params
from retro_jax.models.formats.weights import separate_weights
from retro_jax.models.joined import join_columns, joined_fields, split_columns

CONFIG = ModelConfig("joined", 32, 1, 8, 4, 2, 6, 12, max_positions=16, qkv_bias=True)


@pytest.mark.parametrize("namespace", (np, jnp))
@pytest.mark.parametrize("lead", ((), (3,), (2, 3)))
def test_columns_are_joined_and_split(namespace, lead):
    rng = np.random.default_rng(0)
    widths, parts = (8, 4, 12), 4
    arrays = [namespace.asarray(rng.normal(size=(*lead, width)).astype(np.float32)) for width in widths]
    joined = join_columns(arrays, parts)
    assert type(joined) is type(arrays[0])
    for array, back in zip(arrays, split_columns(jnp.asarray(joined), widths, parts), strict=True):
        np.testing.assert_array_equal(back, array)
    # A device that has one part of four has its part of every array.
    for part in range(parts):
        own = np.asarray(joined)[..., part * 6 : part * 6 + 6]
        expected = [
            array[..., part * w // parts : (part + 1) * w // parts]
            for array, w in zip(arrays, widths, strict=True)
        ]
        np.testing.assert_array_equal(own, np.concatenate(expected, axis=-1))


@pytest.mark.parametrize(
    ("kv_heads", "hidden", "parts"), [(4, 12, 4), (4, 10, 2), (2, 7, 1), (1, 12, 1), (3, 1536, 3)]
)
def test_parts_are_the_most_devices_that_have_as_many_heads_and_channels(kv_heads, hidden, parts):
    config = dataclasses.replace(CONFIG, num_heads=2 * kv_heads, num_kv_heads=kv_heads, hidden_width=hidden)
    assert config.parts == parts
    weights = separate_weights(random_params(config, jax.random.key(0)), config)
    assert weights["layers.0.wk"].shape == (6, 2 * kv_heads)
    assert weights["layers.0.w_up"].shape == (6, hidden)


def test_each_projection_is_that_of_its_own_matrix():
    """Query, key, value and their biases, without norm and rotation."""
    layer = random_params(CONFIG, jax.random.key(0)).layers[0]
    weights = separate_weights(random_params(CONFIG, jax.random.key(0)), CONFIG)
    kind = dataclasses.replace(CONFIG.layers[0], rope=None)
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + CONFIG.norm_eps)
    for name, found in zip("qkv", qkv(layer, CONFIG, kind, x, jnp.zeros((2, 3), jnp.int32)), strict=True):
        expected = h @ weights[f"layers.0.w{name}"] + weights[f"layers.0.b{name}"]
        np.testing.assert_allclose(found.reshape(2, 3, -1), expected, rtol=1e-5, atol=1e-6)


def test_what_lies_in_one_is_what_the_fields_say():
    weights = separate_weights(random_params(CONFIG, jax.random.key(0)), CONFIG)
    for widths in joined_fields(CONFIG).values():
        for name, width in widths.items():
            assert weights[f"layers.0.{name}"].shape[-1] == width
