"""A layer whose devices add up by themselves what they add to the residual stream: as where XLA does it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import retro_jax as rj
from pallas_kernels import Mailbox, add_sum
from retro_jax import mlp
from retro_jax.models import random_params
from retro_jax.models.transformer import rms_norm
from retro_jax.stream import begin as begin_stream
from tests.retro_jax.tiny import ATOL, begin, tiny, token_ids

B, T = 2, 3


@pytest.mark.parametrize(("activation", "mesh", "splits"), (("silu", (1, 2), 1), ("gelu_tanh", (2, 2), 4)))
def test_devices_that_sum_by_themselves_give_what_xla_gives(monkeypatch, activation, mesh, splits):
    config = dataclasses.replace(tiny(2).config, activation=activation)
    layer = random_params(config, jax.random.key(1)).layers[0]
    layer = layer.replace(mlp_norm=jnp.linspace(0.5, 2, config.width))
    x, o = (
        jax.random.normal(jax.random.key(seed), (B, T, *shape))
        for seed, shape in enumerate([(config.width,), (config.num_heads, config.head_dim)])
    )
    behind = jnp.linspace(2, 0.5, config.width)
    valid = jnp.ones((B, T), bool)
    monkeypatch.setattr(mlp, "depth_splits", lambda *sizes: splits)
    expected, _ = mlp.after_attention(layer, config, begin_stream(x, None, config), o, valid, behind, None)
    with jax.set_mesh(rj.make_mesh(*mesh)):
        with_sums = jax.jit(mlp._with_sums, static_argnums=(1, 5))
        found = with_sums(layer, config, x, o, behind, None, None)
    np.testing.assert_allclose(found.x, expected.x, atol=ATOL)
    np.testing.assert_allclose(found.h, expected.h, atol=ATOL)
    np.testing.assert_allclose(found.h, rms_norm(found.x, behind, config.norm_eps), atol=ATOL)
    assert not np.allclose(found.x, x, atol=0.1)  # it adds something


@pytest.mark.parametrize("tokens", (1, T))
def test_a_layer_whose_products_come_in_parts_adds_the_same(monkeypatch, tokens):
    config = dataclasses.replace(tiny(2).config, residual_multiplier=0.5)
    layer = random_params(config, jax.random.key(1)).layers[0]
    layer = layer.replace(attn_post_norm=jnp.linspace(0.5, 2, config.width))
    x, o = (
        jax.random.normal(jax.random.key(seed), (1, tokens, *shape))
        for seed, shape in enumerate([(config.width,), (config.num_heads, config.head_dim)])
    )
    stream, valid = begin_stream(x, layer.attn_norm, config), jnp.ones((1, tokens), bool)
    behind = jnp.linspace(2, 0.5, config.width)
    asked, found = [], []
    for splits in (1, 4):
        monkeypatch.setattr(mlp, "depth_splits", lambda *sizes, n=splits: asked.append(sizes) or n)
        found.append(mlp.after_attention(layer, config, stream, o, valid, behind, None)[0])
    np.testing.assert_allclose(found[0], found[1], atol=ATOL)
    depths = config.num_heads * config.head_dim, config.hidden_width
    assert asked == [(tokens, depth, jnp.float32, None) for depth in depths] * 2


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


def test_a_mailbox_reaches_every_layer_of_a_step(monkeypatch):
    """In place of the kernel a stand-in counts in the cells, and leaves the sum to XLA."""
    model = tiny(2)
    # Of a name of its own: programs are traced once for a configuration.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, name="sums"))
    config = rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=16, dense_layers=1)
    tokens, turns = jnp.asarray(token_ids(2, 24)), []

    def counted(x, parts, norm, mailbox, *, eps, turn):
        mailbox.cells[0, 0] += 1
        turns.append(turn)
        assert norm is not None
        return add_sum(x, parts, norm, None, eps=eps, turn=turn)

    def steps(params, state, tokens):
        for column in range(2):
            state, logits = rj.decode_step(params, model.config, config, state, tokens[:, column])
        return state.length, logits

    def opened(rows, width, dtype):
        cells.append(jax.new_ref(jnp.zeros((2, 1))))
        return Mailbox(cells[-1], jnp.zeros((2, 1), jnp.int32))

    def counting(params, state, tokens):
        found = steps(params, state, tokens)
        return *found, [ref[...] for ref in cells]

    cells = []
    state, _ = begin(tiny(2), config, token_ids(2, 24), (20, 13), 32)
    expected = jax.jit(steps)(model.params, state, tokens[:, 20:])
    monkeypatch.setattr(mlp, "open_mailbox", opened)
    monkeypatch.setattr(mlp, "add_sum", counted)
    mesh = rj.make_mesh(1, 2)
    with jax.set_mesh(mesh):
        params = rj.shard_params(model.params, model.config, mesh)
        state = rj.shard_state(state, model.config, mesh)
        found = jax.jit(counting)(params, state, tokens[:, 20:])
    np.testing.assert_allclose(found[1], expected[1], atol=ATOL)
    assert found[0].tolist() == expected[0].tolist() == [22, 15]
    layers = model.config.num_layers
    assert [ref.tolist() for ref in found[2]] == [
        [[2.0 * layers]] * 2
    ] * 2  # two sums a layer, on each device
    assert set(zip(turns[::2], turns[1::2], strict=True)) == {(0, 1)}
