import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.models import LayerKind, Model, Rope, random_params
from retro_jax.models.presets import SIZES
from retro_jax.plan import layer_plan

TINY = SIZES["tiny"]


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({"method": "full"}, (False,) * 4),
        ({"dense_layers": 0}, (True,) * 4),
        ({"dense_layers": 1}, (False, True, True, True)),
        ({"dense_layers": 9}, (False,) * 4),
    ],
)
def test_the_first_layers_are_dense(fields, sparse):
    plan = layer_plan(TINY, rj.DecodeConfig(**fields))
    assert plan.sparse == sparse
    assert (plan.num_dense, plan.num_sparse) == (4 - sum(sparse), sum(sparse))
    assert plan.first_sparse == plan.num_dense


@pytest.mark.parametrize(
    ("fields", "anchors"),
    [
        ({"dense_layers": 0}, (True,) * 4),
        ({"dense_layers": 0, "anchor_every": 3}, (True, False, False, True)),
        ({"dense_layers": 1, "anchor_every": 2}, (False, True, False, True)),
        ({"dense_layers": 1, "anchor_every": 9}, (False, True, False, False)),
        ({"dense_layers": 9, "anchor_every": 2}, (False,) * 4),
    ],
)
def test_every_so_many_sparse_layers_one_is_an_anchor(fields, anchors):
    assert layer_plan(TINY, rj.DecodeConfig(**fields)).anchors == anchors


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"dense_layers": 1}, (1, 3, 3, 3)),
        ({"dense_layers": 1, "revised_layers": 0.5}, (1, 3, 3, 1)),
        ({"dense_layers": 0, "revised_layers": 0.5}, (3, 3, 1, 1)),
        ({"dense_layers": 2, "revised_layers": 0.01}, (1, 1, 3, 1)),
        ({"dense_layers": 9, "revised_layers": 0.5}, (1, 1, 1, 1)),
    ],
)
def test_the_lowest_sparse_layers_revise(fields, windows):
    config = rj.DecodeConfig("retro", window=3, **fields)
    assert layer_plan(TINY, config).windows == windows
    state = jax.eval_shape(lambda: rj.init_state(TINY, config, 1, 32))
    kept = [1 + (layer.outputs.o.shape[1] if layer.outputs else 0) for layer in state.layers]
    assert tuple(kept) == windows


def test_a_share_that_is_whole_layers_is_so_many():
    twenty = dataclasses.replace(TINY, num_layers=20)
    for layers in range(1, 21):
        config = rj.DecodeConfig("retro", window=2, dense_layers=0, revised_layers=layers / 100 * 5)
        assert layer_plan(twenty, config).windows.count(2) == layers


FULL, WIDE, NARROW = LayerKind(), LayerKind(window=64), LayerKind(window=5)


def mixed(*kinds: LayerKind, **fields):
    return dataclasses.replace(TINY, num_layers=len(kinds), layer_kinds=kinds, **fields)


@pytest.mark.parametrize(
    ("fields", "sparse", "windows", "rings"),
    [
        ({"method": "full"}, (0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (64, None, 5, None, 64, None)),
        ({"dense_layers": 0}, (0, 1, 0, 1, 0, 1), (1, 3, 3, 3, 3, 3), (64, None, 7, None, 66, None)),
        ({"dense_layers": 1}, (0, 0, 0, 1, 0, 1), (1, 1, 1, 3, 3, 3), (64, None, 5, None, 66, None)),
        (
            {"dense_layers": 1, "revised_layers": 0.5},
            (0, 0, 0, 1, 0, 1),
            (1, 1, 1, 3, 3, 1),
            (64, None, 5, None, 66, None),
        ),
        ({"dense_layers": 3}, (0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (64, None, 5, None, 64, None)),
        (
            {"dense_layers": 1, "rectify_every": 4},
            (0, 0, 0, 1, 0, 1),
            (1, 1, 1, 3, 3, 3),
            (67, None, 8, None, 67, None),
        ),
    ],
)
def test_only_full_attention_is_dense_or_sparse(fields, sparse, windows, rings):
    """The others serve the queries of the sparse layer below, and have room for the window of each."""
    window = {} if fields.get("method") else {"window": 3}
    plan = layer_plan(mixed(WIDE, FULL, NARROW, FULL, WIDE, FULL), rj.DecodeConfig(**fields, **window))
    assert plan.sparse == tuple(map(bool, sparse))
    assert (plan.windows, plan.rings) == (windows, rings)
    assert (plan.num_dense, plan.num_sparse) == (3 - sum(sparse), sum(sparse))
    assert plan.first_sparse == (sparse.index(1) if any(sparse) else 6)
    context = jnp.array([3, 60, 1000])
    held = [sum(min(tokens, ring) for ring in rings if ring) for tokens in (3, 60, 1000)]
    assert plan.in_rings(context).tolist() == held


def test_the_cache_of_a_window_does_not_grow_with_the_context():
    model = mixed(WIDE, FULL, NARROW, max_positions=100_000)
    config = rj.DecodeConfig("retro", window=3, dense_layers=0, page_size=8)
    for capacity, pages in ((40, (8, 8, 8)), (1000, (8, 128, 8)), (80_000, (8, 10_000, 8))):
        state = jax.eval_shape(lambda capacity=capacity: rj.init_state(model, config, 2, capacity))
        assert tuple(layer.pages.shape[2] for layer in state.layers) == pages
        assert state.capacity == pages[1] * 8
        assert [layer.last_loaded is None for layer in state.layers] == [True, False, True]


def test_a_window_of_all_positions_is_full_attention():
    kinds = (LayerKind(), LayerKind(window=64), LayerKind(), LayerKind())
    limited = dataclasses.replace(TINY, layer_kinds=kinds, max_positions=64)
    assert layer_plan(limited, rj.DecodeConfig()) == layer_plan(TINY, rj.DecodeConfig())


def test_a_soft_cap_of_scores_is_refused():
    capped = dataclasses.replace(TINY, layer_kinds=(LayerKind(),) * 3 + (LayerKind(soft_cap=50.0),))
    with pytest.raises(ValueError, match=r"layer 3 of tiny caps its attention scores at 50\.0"):
        rj.init_state(capped, rj.DecodeConfig(), 1, 32)


def test_decoding_follows_the_kind_of_each_layer():
    """With a budget for all pages it is the dense model, whatever ropes, scales and sinks its layers have.

    So it is with every part that a model may have.
    """
    kinds = (
        LayerKind(None, scale=0.5, sinks=True),
        LayerKind(Rope(100.0, channels=6), scale=0.1, sinks=True),
    )
    parts = {"norms": "both", "qk_norm": True, "joint_qk_norm": True, "activation": "gelu_tanh"}
    parts |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_divisor": 0.5}
    config = dataclasses.replace(
        TINY, num_layers=2, layer_kinds=kinds, max_positions=64, logits_soft_cap=2.0, **parts
    )
    model = Model(config, random_params(config, jax.random.key(0)), None)
    ids = np.random.default_rng(0).integers(0, 512, 24)
    decode = rj.DecodeConfig("retro", page_size=8, dense_layers=1, budget_tokens=64)
    nll = rj.score(model, ids, decode, prompt_tokens=16).nll
    logits = jax.nn.log_softmax(rj.models.forward(model.params, config, jnp.asarray(ids)[None]))[0]
    expected = -np.take_along_axis(np.asarray(logits)[:-1], ids[1:, None], 1)[:, 0]
    np.testing.assert_allclose(np.ravel(nll)[-8:], expected[-8:], atol=1e-4)
