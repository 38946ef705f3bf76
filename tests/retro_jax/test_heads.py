"""Heads that a kernel makes of the joined product are those of the model, written into the same places."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels.update import api as update
from retro_jax.heads import write_heads, write_ring_heads
from retro_jax.models import LayerKind, ModelConfig, Rope, random_params

MODEL = ModelConfig(
    name="heads",
    vocab_size=8,
    num_layers=1,
    num_heads=12,
    num_kv_heads=4,
    head_dim=16,
    width=24,
    hidden_width=10,  # so that the columns lie in two parts
    max_positions=64,
)
NO_NORM = {"norm_eps": 0.0, "q_scale": 1.0, "dtype": jnp.bfloat16}
NORMED = {"qkv_bias": True, "qk_norm": True}


def with_kernel(monkeypatch):
    """Makes believe that a GPU is there, whose kernel the reference stands in for; the list of its calls."""
    calls = []

    def kernel(*arrays, **options):
        calls.append(options)
        return update.reference.update_from_product(*arrays, **options)

    monkeypatch.setattr(update.mosaic_gpu, "update_from_product", kernel)
    monkeypatch.setattr(update.mosaic_gpu, "update_pages", update.reference.update_pages)
    for module in ("pallas_kernels.dispatch", "retro_jax.heads"):
        monkeypatch.setattr(f"{module}.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return calls


@pytest.mark.parametrize(
    ("fields", "kind", "taken"),
    [
        ({}, LayerKind(), True),
        (NORMED, LayerKind(Rope(500.0), scale=0.1), True),
        ({}, LayerKind(Rope(channels=8)), False),  # the kernel rotates all or none
        ({"qk_norm": True}, LayerKind(rope=None), True),
        (NORMED | {"joint_qk_norm": True}, LayerKind(), False),  # of all heads, which no device has by itself
    ],
)
def test_heads_of_the_product_are_those_of_the_model(monkeypatch, fields, kind, taken):
    model = dataclasses.replace(MODEL, layer_kinds=(kind,), **fields)
    assert model.parts == 2
    (layer,) = random_params(model, jax.random.key(0)).layers
    layer = jax.tree.map(lambda w: w if w.ndim > 1 else w + jnp.linspace(-0.5, 0.5, w.size), layer)
    config = rj.DecodeConfig(page_size=8, dense_layers=0)
    state = rj.init_state(model, config, 2, 32)
    start, write = jnp.array([-1, 13]), jnp.array([[False, True, True], [True, True, True]])
    positions = jnp.where(write, start[:, None] + jnp.arange(3), -1)
    x = jax.random.normal(jax.random.key(1), (2, 3, model.width))

    def heads(implementation):
        arguments = state.layers[0], x, positions, start, write, implementation
        return jax.jit(lambda: write_heads(layer, model, kind, config, *arguments))()

    expected = heads(None)
    calls = with_kernel(monkeypatch)
    got = heads(None)
    assert len(calls) == taken
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for array, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-6)


@pytest.mark.parametrize("tokens", (1, 3))
def test_heads_of_the_product_are_written_around_the_end_of_a_ring(monkeypatch, tokens):
    (layer,), (kind,) = random_params(MODEL, jax.random.key(0)).layers, MODEL.layers
    pages = jnp.zeros((2, 4, 2, 2, 8, 16))
    start, write = jnp.array([21, 3]), jnp.ones((2, tokens), bool)
    x = jax.random.normal(jax.random.key(1), (2, tokens, MODEL.width))
    arguments = 11, pages, x, start[:, None] + jnp.arange(tokens), start, write

    def heads(implementation):
        return jax.jit(lambda: write_ring_heads(layer, MODEL, kind, *arguments, implementation))()

    expected = heads(None)
    calls = with_kernel(monkeypatch)
    got = heads(None)
    assert len(calls) == (2 if tokens > 1 else 1)  # one of them from the first place on
    for array, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-6)


def test_heads_of_many_tokens_are_not_the_kernels(monkeypatch):
    calls = with_kernel(monkeypatch)
    for tokens in (update.FEW_TOKENS, update.FEW_TOKENS + 1):
        jax.eval_shape(
            functools.partial(update.update_from_product, part_heads=2, **NO_NORM),
            jnp.zeros((1, 4, 2, 2, 8, 16), jnp.bfloat16),
            None,
            jnp.zeros((8, 1, tokens, 5 * 64)),
            *[None] * 5,
            jnp.zeros(1, int),
            jnp.ones((1, tokens), bool),
        )
        assert len(calls) == 1


def test_a_product_of_other_heads_is_refused():
    pages, arguments = (
        jnp.zeros((1, 4, 2, 2, 8, 16)),
        (*[None] * 5, jnp.zeros(1, int), jnp.ones((1, 1), bool)),
    )
    for columns, part_heads in ((5 * 64 + 16, 2), (2 * 64, 2), (5 * 64, 3)):
        with pytest.raises(ValueError, match=f"{columns} columns in parts of {part_heads} KV heads is not"):
            update.update_from_product(
                pages, None, jnp.zeros((1, 1, 1, columns)), *arguments, part_heads=part_heads, **NO_NORM
            )
    with pytest.raises(ValueError, match=r"a product of 1 rows is not that of 2 tokens"):
        update.update_from_product(
            pages,
            None,
            jnp.zeros((8, 1, 1, 5 * 64)),
            *[None] * 5,
            jnp.zeros(1, int),
            jnp.ones((1, 2), bool),
            part_heads=2,
            **NO_NORM,
        )
