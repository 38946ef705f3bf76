"""A layer whose devices add up by themselves what they add to the residual stream: as where XLA does it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import retro_jax as rj
from pallas_kernels import Mailbox
from retro_jax import mlp
from retro_jax.models import random_params
from tests.retro_jax.tiny import ATOL, tiny

B, T = 2, 3


@pytest.mark.parametrize(("activation", "mesh"), (("silu", (1, 2)), ("gelu_tanh", (2, 2))))
def test_devices_that_sum_by_themselves_give_what_xla_gives(activation, mesh):
    config = dataclasses.replace(tiny(2).config, activation=activation)
    layer = random_params(config, jax.random.key(1)).layers[0]
    layer = layer.replace(mlp_norm=jnp.linspace(0.5, 2, config.width))
    x, o = (
        jax.random.normal(jax.random.key(seed), (B, T, *shape))
        for seed, shape in enumerate([(config.width,), (config.num_heads, config.head_dim)])
    )
    expected, _ = mlp.after_attention(layer, config, x, o, jnp.ones((B, T), bool), None)
    with jax.set_mesh(rj.make_mesh(*mesh)):
        found = jax.jit(mlp._with_sums, static_argnums=1)(layer, config, x, o, None)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    assert not np.allclose(found, x, atol=0.1)  # it adds something


@pytest.mark.parametrize(
    ("fields", "weights", "plain"),
    (
        ({}, {}, True),
        ({"residual_multiplier": 0.5}, {}, False),
        ({}, {"bo": jnp.zeros(32)}, False),
        ({}, {"mlp_norm": None}, False),
        ({}, {"attn_post_norm": jnp.ones(32)}, False),
        ({}, {"mlp_post_norm": jnp.ones(32)}, False),
    ),
)
def test_layers_that_do_more_than_add_are_left_to_xla(fields, weights, plain):
    model = tiny(2)
    config = dataclasses.replace(model.config, **fields)
    assert mlp._is_plain(model.params.layers[0].replace(**weights), config) is plain


@pytest.mark.parametrize(
    ("fields", "batch", "mesh", "rows"),
    (
        ({}, 2, (1, 2), 2 * 3),
        ({}, 4, (2, 2), 2 * 3),
        ({"implementation": "xla"}, 2, (1, 2), None),
        ({}, 3, (2, 2), None),
    ),
)
def test_a_step_asks_for_room_for_its_windows(monkeypatch, fields, batch, mesh, rows):
    asked = []
    monkeypatch.setattr(mlp, "open_mailbox", lambda *sizes: asked.append(sizes) or Mailbox(None, None))
    model = tiny(2).config
    with jax.set_mesh(rj.make_mesh(*mesh)):
        mailbox = mlp.step_mailbox(model, rj.DecodeConfig("retro", window=3, **fields), batch)
    assert (mailbox is None) == (rows is None)
    assert asked == ([] if rows is None else [(rows, model.width, model.dtype)])


def test_weights_are_spread_as_their_fields_say():
    assert mlp._spread(mlp.LayerParams, "wo") == P("model")
    assert mlp._spread(mlp.LayerParams, "w_gate_up") == P(None, "model")
    assert mlp._spread(mlp.LayerParams, "mlp_norm") == P()
