"""A model written by `save_model` is the model, on any mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.experiments.io.models import known_model
from retro_jax.models.config import LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.config_json import from_json, to_json
from tests.models import golden

SOURCES = ("llama3.1-sharded", "gguf-qwen2.gguf", "qwen2.5-yarn")
QWEN3 = str(golden.FOLDER / "qwen3")
MESSAGES = [{"role": "user", "content": "Grüße, 12 Äpfel"}]


@pytest.fixture(scope="module", params=SOURCES)
def converted(request, tmp_path_factory):
    model = models.load_model(str(golden.FOLDER / request.param))
    folder = tmp_path_factory.mktemp("converted") / "model"
    models.save_model(model, folder)
    return model, folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = models.load_model(QWEN3)
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    models.save_model(model, str(folder))
    return model, folder


def assert_same_weights(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_it_is_the_same_model(converted, tmp_path):
    model, folder = converted
    moved = shutil.move(shutil.copytree(folder, tmp_path / "a"), tmp_path / "b")  # it needs nothing else
    again = models.load_model(str(moved))
    assert again.config == model.config
    assert_same_weights(again.params, model.params)
    mine, theirs = again.tokenizer, model.tokenizer
    assert (mine is None) == (theirs is None)
    if mine is not None:
        own = {name: value for name, value in vars(theirs).items() if name != "backend"}
        assert {name: getattr(mine, name) for name in own} == own
        assert mine.backend.to_str() == theirs.backend.to_str()
        for text in ("Grüße,  12 Äpfel\n\n<|im_end|>", ""):
            assert mine.encode(text) == theirs.encode(text)
            assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))
        if theirs.chat_template:
            assert mine.chat(MESSAGES) == theirs.chat(MESSAGES)


def test_it_is_read_onto_a_mesh(tiny):
    model, folder = tiny
    mesh = rj.make_mesh(2, 2)
    sharded = models.load_model(str(folder), shardings=rj.params_on(mesh))
    placed = rj.shard_params(model.params, model.config, mesh)
    assert_same_weights(sharded.params, model.params)
    for mine, theirs in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(placed), strict=True):
        assert mine.sharding == theirs.sharding
    wide = sharded.params.layers[0].wqkv
    assert wide.addressable_shards[0].data.shape == (wide.shape[0], wide.shape[1] // 2)


def test_weights_that_lie_on_a_mesh_are_written_as_they_are(tiny, tmp_path):
    model, folder = tiny
    params = rj.shard_params(model.params, model.config, rj.make_mesh(1, 2))
    models.save_model(dataclasses.replace(model, params=params), tmp_path / "sharded")
    about, same = (
        json.loads((path / "about" / "about.json").read_text()) for path in (tmp_path / "sharded", folder)
    )
    assert about == same
    assert_same_weights(models.load_model(str(tmp_path / "sharded")).params, model.params)


def test_other_sources_are_placed_too(tiny):
    model, _ = tiny
    sharded = models.load_model(QWEN3, shardings=rj.params_on(rj.make_mesh(1, 2)))
    assert len(sharded.params.embed.sharding.device_set) == 2
    assert_same_weights(sharded.params, model.params)


def test_a_mesh_that_does_not_divide_it(tiny):
    with pytest.raises(ValueError, match="num_kv_heads 2 does not divide over 4 devices"):
        models.load_model(str(tiny[1]), shardings=rj.params_on(rj.make_mesh(1, 4)))


def test_another_dtype(tiny):
    model, folder = tiny
    rounded = models.load_model(str(folder), dtype="bfloat16")
    assert rounded.config == dataclasses.replace(model.config, dtype="bfloat16")
    assert_same_weights(rounded.params, jax.tree.map(lambda array: array.astype("bfloat16"), model.params))


def test_its_sizes_are_known_before_it_is_read(tiny):
    model, folder = tiny
    assert known_model(str(folder), "bfloat16") == dataclasses.replace(model.config, dtype="bfloat16")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": 4}, "has matrices joined in 4 parts, this version of retro-jax joins them in 2; convert"),
        (
            {"config": {"adapters": 8}},
            "does not describe a model .ModelConfig has no adapters, which another",
        ),
        ({"config": {"name": "x"}}, "does not describe a model .*missing"),
        ({"tokenizer": {}}, "is none of retro-jax's folders, or a part of one: it has no tokenizer/token"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, tmp_path, values, message):
    folder = shutil.copytree(tiny[1], tmp_path / "other")
    file = folder / "about" / "about.json"
    about = json.loads(file.read_text())
    if "config" in values and "name" not in values["config"]:
        values = {"config": about["config"] | values["config"]}
    file.write_text(json.dumps(about | values))
    with pytest.raises(ValueError, match=message):
        models.load_model(str(folder))


def test_a_half_written_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smol.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/smol is half-written"):
        models.load_model("runs/smol")


def test_a_tokenizer_of_ones_own(tiny, tmp_path):
    model = dataclasses.replace(tiny[0], tokenizer=object())
    with pytest.raises(TypeError, match="a tokenizer of type object cannot be written"):
        models.save_model(model, tmp_path / "model")


def test_configurations_are_json():
    kinds = (LayerKind(Rope(1e4, RopeScaling("factors", factors=(1.0, 2.0))), window=8), LayerKind(None))
    config = ModelConfig("a", 8, 2, 2, 1, 4, 8, 16, 32, layer_kinds=kinds, dtype="bfloat16")
    values = json.loads(json.dumps(to_json(config)))
    assert from_json(ModelConfig, values) == config
    del values["qk_norm"]  # of a version that does not know it
    assert from_json(ModelConfig, values) == config
