"""Channels of keys are made alike, and the model stays what it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import quantize
from retro_jax import models
from retro_jax.models import balance_keys
from retro_jax.models.joined import join_columns, joined_fields, split_columns
from retro_jax.models.presets import SIZES

TINY = SIZES["tiny"]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(TINY.vocab_size, size=(1, 40)))


def outlying(config):
    """Random weights with a few channels of keys a hundred times as large, and queries that much smaller."""
    params = models.random_params(config, jax.random.key(0))
    widths = [*joined_fields(config)["wqkv"].values()]
    large = np.where(np.arange(config.head_dim) % 8 == 3, 100.0, 1.0)
    tiled = [
        np.tile(large**sign, width // config.head_dim) for width, sign in zip(widths, (-1, 1, 0), strict=True)
    ]
    by_column = join_columns([jnp.asarray(columns, config.dtype) for columns in tiled], config.parts)

    def layer(layer):
        if config.qk_norm:
            norm = jnp.asarray(large, config.dtype)
            return layer.replace(q_norm=layer.q_norm / norm, k_norm=layer.k_norm * norm)
        bqkv = None if layer.bqkv is None else layer.bqkv * by_column
        return layer.replace(wqkv=layer.wqkv * by_column, bqkv=bqkv)

    return params.replace(layers=tuple(map(layer, params.layers)))


def copied(params):
    return jax.tree.map(jnp.copy, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["plain", "bias", "norm"])
def test_outputs_stay_as_they_were_to_the_last_bit(parts, dtype):
    config = dataclasses.replace(TINY, dtype=dtype, **parts)
    params = outlying(config)
    before = models.forward(params, config, TOKENS)
    balanced = balance_keys(copied(params), config)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, balanced)), strict=True))
    np.testing.assert_array_equal(before, models.forward(balanced, config, TOKENS))


@pytest.mark.parametrize("parts", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["plain", "bias", "norm"])
def test_eight_bits_hold_every_channel(parts):
    config = dataclasses.replace(TINY, **parts)
    params = outlying(config)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def error(params):
        """Of scores by keys in 8 bits, relative to how far the scores differ among themselves."""
        q, k, _ = models.qkv(
            params.layers[0], config, config.layers[0], models.embed(params, TOKENS), positions
        )
        codes, scales = quantize(k, "int8")
        back = codes.astype(jnp.float32) * scales[..., None]
        q = q.reshape(*k.shape[:3], -1, k.shape[-1])
        exact, rounded = (np.asarray(jnp.einsum("btkgd,bskd->bkgts", q, keys)) for keys in (k, back))
        return np.sqrt(np.mean((exact - rounded) ** 2)) / exact.std()

    before, after = error(params), error(balance_keys(copied(params), config))
    assert after < 0.01 < 0.1 < before


def test_dead_channels_and_models_that_are_balanced_stay():
    params = models.random_params(TINY, jax.random.key(0))
    widths = [*joined_fields(TINY)["wqkv"].values()]
    alive = [jnp.ones(width).at[:4].set(0 if index == 1 else 1) for index, width in enumerate(widths)]
    dead = params.layers[0].replace(wqkv=params.layers[0].wqkv * join_columns(alive, TINY.parts))
    params = params.replace(layers=(dead, *params.layers[1:]))
    balanced = balance_keys(copied(params), TINY)
    keys = split_columns(balanced.layers[0].wqkv, widths, TINY.parts)[1]
    assert np.isfinite(keys).all() and not np.asarray(keys[:, :4]).any()
    again = balance_keys(copied(balanced), TINY)
    jax.tree.map(np.testing.assert_array_equal, balanced, again)
