"""States come back as they were: on other devices, in more rows, in a longer cache."""

import json
import re
import shutil
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.models import random_params
from retro_jax.models.fingerprint import named_arrays
from retro_jax.sampling import sequence_keys
from tests.retro_jax.tiny import CENTROIDS, tiny

SIZES = {"page_size": 8, "budget_tokens": 24, "dense_layers": 1, "prefill_chunk": 16}
CONFIGS = {
    "quest": rj.DecodeConfig("quest", **SIZES),
    "paper": rj.DecodeConfig("retro", window=4, rectify_every=4, **SIZES),
    "mean-key": rj.DecodeConfig("quest", **SIZES, **CENTROIDS, cache_dtype="int8"),
    "snapkv": rj.DecodeConfig("snapkv", **SIZES, observation=8, cache_dtype="float8_e4m3fn"),
}
"""Among them they have each array that a state can have, but for sums of attention."""

CONFIG = CONFIGS["paper"]
MODEL = tiny(3)


def on_mesh(data, heads):
    mesh = rj.make_mesh(data, heads)
    return replace(MODEL, params=rj.shard_params(MODEL.params, MODEL.config, mesh))


def filled(config, rows=2, capacity=64, seed=0):
    """A state with something in each of its arrays, and the configuration's budget."""
    rng = np.random.default_rng(seed)
    empty = rj.init_state(MODEL.config, config, rows, capacity)
    state = jax.tree.map(lambda array: jnp.array(rng.integers(0, 9, array.shape), array.dtype), empty)
    return state.replace(budget=empty.budget)


def generation(state, config=CONFIG, sequences=1, **changes):
    values = {
        "texts": ["é\ud800"] * sequences,
        "tokens": [[1, 2]] * sequences,
        "logprobs": [[-0.1, -1e-30]] * sequences,
        "finished": [True] * sequences,
        "metrics": None,
        "config": config,
        "state": state,
        "pending": np.array([2] * sequences, np.int32),
        "turns": [[0, 1, 2]] * sequences,
        "exact": False,
        "sampling": rj.Sampling(0.7, top_p=0.9, seed=3),
        "keys": sequence_keys(rj.Sampling(), sequences),
        "verify": 4,
    }
    return rj.Generation(**values | changes)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (name, a), b in zip(named_arrays(one).items(), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_array_comes_back_on_any_mesh(name, tmp_path):
    config, folder = CONFIGS[name], tmp_path / "state"
    state = filled(config)
    rj.save_state(MODEL, state, folder, config)
    wide = on_mesh(2, 2)
    there = rj.load_state(wide, folder, config)
    assert_same(there, state)
    placed = rj.shard_state(state, MODEL.config, rj.make_mesh(2, 2))
    for mine, theirs in zip(jax.tree.leaves(there), jax.tree.leaves(placed), strict=True):
        assert not mine.size or mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)
    rj.save_state(wide, there, tmp_path / "back", config)
    here = rj.load_state(MODEL, tmp_path / "back")
    assert_same(here, state)
    assert all(len(array.devices()) == 1 for array in jax.tree.leaves(here))


def test_a_generation_comes_back(tmp_path):
    saved = generation(filled(CONFIG))
    rj.save_state(MODEL, saved, tmp_path / "state")
    found = rj.load_state(MODEL, str(tmp_path / "state"))
    for field in fields(saved):
        one, other = getattr(found, field.name), getattr(saved, field.name)
        if field.name == "state":
            assert_same(one, other)
        elif field.name == "keys":
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(other))
        else:
            np.testing.assert_array_equal(one, other)
    assert found.pending.dtype == np.int32


def test_more_rows_and_a_longer_cache_are_empty(tmp_path):
    state = filled(CONFIG, rows=1)
    rj.save_state(MODEL, generation(state), tmp_path / "state")
    longer = rj.load_state(on_mesh(2, 1), tmp_path / "state", capacity=100).state
    empty = rj.init_state(MODEL.config, CONFIG, 2, 100)
    assert longer.capacity == 128
    for (name, array), before, fresh in zip(
        named_arrays(longer).items(), jax.tree.leaves(state), jax.tree.leaves(empty), strict=True
    ):
        expected = np.array(fresh)
        expected[tuple(map(slice, before.shape))] = before
        np.testing.assert_array_equal(array, expected, err_msg=name)
    rj.save_state(MODEL, state, tmp_path / "plain", CONFIG)
    with pytest.raises(ValueError, match="batch 1 does not divide over 2 devices of mesh axis 'data'"):
        rj.load_state(on_mesh(2, 1), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"capacity 999 is not within 1\.\.256"):
        rj.load_state(MODEL, tmp_path / "plain", capacity=999)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "state"
    rj.save_state(MODEL, filled(CONFIG), folder, CONFIG)
    return folder


def with_sizes(**changes):
    config = replace(MODEL.config, **changes)
    return rj.Model(config, random_params(config, jax.random.key(0)), None)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (MODEL, replace(CONFIG, window=2), "(window 4, not 2); give those that it was made with"),
        (
            with_sizes(norm_eps=1e-6),
            replace(CONFIG, method="quest", window=None),
            "(norm_eps 1e-05, not 1e-06; method 'retro', not 'quest'; window 4, not None); give those",
        ),
        (with_sizes(width=16, max_positions=128), CONFIG, "(width 32, not 16; max_positions 256, not 128);"),
        (with_sizes(name="b"), CONFIG, "(the weights of 'tiny-group-3', not those of 'b'); give"),
    ],
)
def test_another_model_or_configuration(written, model, config, message):
    with pytest.raises(ValueError, match=re.escape("made with another model or configuration " + message)):
        rj.load_state(model, written, config)


def test_names_and_kernels_may_be_others(written):
    renamed = replace(MODEL, config=replace(MODEL.config, name="elsewhere"))
    rj.load_state(renamed, written, replace(CONFIG, implementation="xla"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config", {"method": "mine"}, "not possible here: method 'mine' is unknown"),
        ("config", {"later": 1}, "not possible here: DecodeConfig has no later, which another version"),
        ("model", {"heads_x": 8}, "not possible here: ModelConfig has no heads_x"),
    ],
)
def test_what_another_version_wrote(written, tmp_path, name, values, message):
    folder = shutil.copytree(written, tmp_path / "copy")
    file = folder / "about" / "about.json"
    about = json.loads(file.read_text())
    about[name] |= values
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        rj.load_state(MODEL, folder)


def test_what_cannot_be_saved(tmp_path):
    folder, state = tmp_path / "state", filled(CONFIG)
    with pytest.raises(TypeError, match="does not know its configuration; pass it as config"):
        rj.save_state(MODEL, state, folder)
    with pytest.raises(ValueError, match=r"another .*\(hidden is float32\[2, 3, 32\], not float32\[2, 0"):
        rj.save_state(MODEL, state, folder, CONFIGS["quest"])
    with pytest.raises(ValueError, match=r"was decoded by .*window=4.*, not by .*; leave it out"):
        rj.save_state(MODEL, generation(state), folder, CONFIGS["quest"])
    state.length.delete()
    with pytest.raises(ValueError, match="was decoded further, which consumed it; save the later one"):
        rj.save_state(MODEL, generation(state), folder)
    assert not folder.exists()


def test_a_state_is_saved_with_its_own_budget(tmp_path):
    state = filled(CONFIG)
    with pytest.raises(
        ValueError, match=r"another budget .*at least 24 tokens; the configuration's are 0 and 32"
    ):
        rj.save_state(MODEL, state, tmp_path / "other", replace(CONFIG, budget_tokens=32))
    least = state.budget.replace(floor=state.budget.floor.at[0].set(16))  # of one sequence its own
    rj.save_state(MODEL, state.replace(budget=least), tmp_path / "own", CONFIG)
    assert rj.load_state(MODEL, tmp_path / "own", CONFIG).budget.floor.tolist() == [16, 24]
