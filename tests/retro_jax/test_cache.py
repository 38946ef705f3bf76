"""How the arrays of a state, and weights, are spread over a mesh: each field says it, and none is guessed."""

import functools
from dataclasses import fields

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array

import retro_jax as rj
from retro_jax.cache import Kept, spread
from retro_jax.models.transformer import LayerParams
from retro_jax.sharding import params_shardings, state_shardings
from tests.retro_jax.tiny import CENTROIDS, tiny

MESH = AbstractMesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
SNAPKV = rj.DecodeConfig("snapkv", page_size=8, budget_tokens=48, dense_layers=1, observation=8)
EXPECTED = rj.DecodeConfig("expected", page_size=8, budget_tokens=48, dense_layers=1)
CENTROIDS = rj.DecodeConfig("retro", page_size=8, dense_layers=1, rectify_every=3, **CENTROIDS)


def state_of(config):
    return jax.eval_shape(functools.partial(rj.init_state, tiny(3).config, config, 4, 64))


@pytest.mark.parametrize("config", (SNAPKV, EXPECTED, CENTROIDS), ids=lambda config: config.method)
def test_each_array_is_spread_over_its_sequences_and_heads(config):
    state = state_of(config)
    shardings = jax.tree_util.tree_leaves_with_path(state_shardings(state, MESH))
    found = {jax.tree_util.keystr(path): tuple(sharding.spec) for path, sharding in shardings}
    assert len(found) == len(jax.tree.leaves(state))
    by_heads = {"pages", "values", "scales", "block_values", "last_loaded", "alive", "mass"}
    by_query_heads = {"o", "lse", "queries"}
    by_query_heads_first = {"mean", "scatter"}
    for path, spec in found.items():
        name = path.rpartition(".")[2]
        axes = (
            ("model",)
            if name in by_heads | by_query_heads_first
            else (None, "model")
            if name in by_query_heads
            else ()
        )
        assert spec == ("data", *axes), path


@flax.struct.dataclass
class Ages(Kept):
    ages: Array | None = None


@flax.struct.dataclass
class SpreadAges(Kept):
    ages: Array | None = spread("data", "model", default=None)


@pytest.mark.parametrize("ages", (jnp.zeros((4, 2, 8)), {"a": [jnp.zeros(4)]}))
def test_an_array_for_which_no_field_says_it_is_refused(ages):
    state = state_of(SNAPKV)

    def carrying(kind):
        layer = state.layers[-1].replace(kept=kind(alive=state.layers[-1].kept.alive, ages=ages))
        return state.replace(layers=(*state.layers[:-1], layer))

    refusal = (
        r"DecodeState\.layers\[2\]\.kept\.ages.* does not say how it is spread .*`spread` of retro_jax\.cache"
    )
    with pytest.raises(TypeError, match=refusal):
        state_shardings(carrying(Ages), MESH)
    kept = state_shardings(carrying(SpreadAges), MESH).layers[-1].kept
    assert {tuple(sharding.spec) for sharding in jax.tree.leaves(kept.ages)} == {("data", "model")}


def test_weights_are_divided_along_heads_hidden_channels_and_tokens():
    model = tiny(3)
    params = model.params.replace(head=model.params.embed.T)
    bias = {name: jnp.zeros(size) for name, size in (("bqkv", 160), ("q_norm", 16))}
    params = params.replace(layers=(params.layers[0].replace(**bias),))
    shardings = jax.tree_util.tree_leaves_with_path(params_shardings(params, MESH))
    found = {path[-1].name: tuple(sharding.spec) for path, sharding in shardings}
    whole = dict.fromkeys(("embed", "final_norm", "attn_norm", "mlp_norm", "q_norm"), ())
    columns = dict.fromkeys(("wqkv", "w_gate_up", "head"), (None, "model"))
    rows = dict.fromkeys(("wo", "w_down"), ("model", None))
    assert found == whole | columns | rows | {"bqkv": ("model",)}


@flax.struct.dataclass
class Gated(LayerParams):
    gate: Array | None = None


def test_a_weight_for_which_no_field_says_it_is_refused():
    params = tiny(3).params
    layer = Gated(**{field.name: getattr(params.layers[0], field.name) for field in fields(LayerParams)})
    assert params_shardings(params.replace(layers=(layer,)), MESH)
    layer = layer.replace(gate=jnp.zeros(3))
    with pytest.raises(
        TypeError, match=r"Params\.layers\[0\]\.gate does not say .*`weight` of retro_jax\.models"
    ):
        params_shardings(params.replace(layers=(layer,)), MESH)
