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


def test_a_window_shorter_than_the_positions_is_refused():
    kinds = (LayerKind(), LayerKind(window=64), LayerKind(), LayerKind())
    sliding = dataclasses.replace(TINY, layer_kinds=kinds)
    with pytest.raises(
        ValueError, match=r"layer 1 of tiny .* window of 64 .* max_positions of at most 64, not"
    ):
        rj.init_state(sliding, rj.DecodeConfig(), 1, 32)
    limited = dataclasses.replace(sliding, max_positions=64)
    assert layer_plan(limited, rj.DecodeConfig()).sparse == layer_plan(TINY, rj.DecodeConfig()).sparse


def test_a_soft_cap_of_scores_is_refused():
    capped = dataclasses.replace(TINY, layer_kinds=(LayerKind(),) * 3 + (LayerKind(soft_cap=50.0),))
    with pytest.raises(ValueError, match=r"layer 3 of tiny caps its attention scores at 50\.0"):
        rj.init_state(capped, rj.DecodeConfig(), 1, 32)


def test_decoding_follows_the_kind_of_each_layer():
    """With a budget for all pages it is the dense model, whatever the ropes and scales below and above.

    So it is with every part that a model may have.
    """
    kinds = (LayerKind(None, scale=0.5), LayerKind(Rope(100.0, channels=6), scale=0.1))
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
