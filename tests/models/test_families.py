"""A family of its own, made here, loads from both formats; so another family is one file and its place."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax import models
from retro_jax.models import LayerKind, Rope, families
from retro_jax.models.families import QWEN3
from retro_jax.models.families.family import NAMES, Family, FileFormat, WeightName, layer_fields
from retro_jax.models.formats.weights import checkpoint_name, separate_weights
from retro_jax.models.presets import SIZES
from tests.models import golden

QWEN = golden.FOLDER / "qwen3"
ROPE = Rope(1_000_000.0)
WINDOW = LayerKind(ROPE, window=8)


def _some_without_rope(keys, kinds):
    """Every `no_rope_layer_interval`-th layer has no rotary embedding."""
    period = keys["no_rope_layer_interval"]
    return tuple(
        dataclasses.replace(kind, rope=None) if (layer + 1) % period == 0 else kind
        for layer, kind in enumerate(kinds)
    )


TOY_FORMAT = FileFormat(
    "toy",
    defaults={"no_rope_layer_interval": 2},
    keys=frozenset({"no_rope_layer_interval"}),
    layer_kinds=_some_without_rope,
)
TOY = Family(
    huggingface=TOY_FORMAT,
    gguf=TOY_FORMAT,
    parts={"qk_norm": True},
    names=NAMES | {"layers.{i}.wo": WeightName("model.layers.{i}.out.weight", "blk.{i}.out.weight")},
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))


def toy_folder(path, **changes):
    """The tiny Qwen3, said to be a toy."""
    folder = shutil.copytree(QWEN, path / "toy")
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": "toy"} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("self_attn.o_proj", "out"): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


def toy_gguf(path, model: models.Model, **keys):
    """A model's weights as a GGUF file of a toy."""
    config = model.config
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(model.config.layers[0].rope.theta)
    for key, value in keys.items():
        writer.add_uint32(f"toy.{key}", value)
    table = {path: name.gguf for path, name in TOY.names.items()}
    for parameter, weight in separate_weights(model.params, config).items():
        array = np.asarray(weight, np.float32)
        array = np.ascontiguousarray(array if parameter == "embed" else array.T)
        writer.add_tensor(checkpoint_name(table, parameter), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_toy_family_loads_from_both_formats(toy, tmp_path):
    folder = models.load_model(str(toy_folder(tmp_path)))
    qwen = models.load_model(str(QWEN))
    rope = qwen.config.layers[0].rope
    assert folder.config.layers == (LayerKind(rope), LayerKind(None))
    assert folder.config.qk_norm and folder.config.max_positions == qwen.config.max_positions
    file = models.load_model(str(toy_gguf(tmp_path / "toy.gguf", folder)))
    assert file.config == dataclasses.replace(folder.config, name="toy")
    jax.tree.map(np.testing.assert_array_equal, file.params, folder.params)
    jax.tree.map(np.testing.assert_array_equal, folder.params, qwen.params)


def test_a_toy_family_reads_its_own_key_in_both_formats(toy, tmp_path, caplog):
    folder = models.load_model(str(toy_folder(tmp_path, no_rope_layer_interval=1)))
    assert folder.config.layers == (LayerKind(None),) * 2
    like_qwen = models.load_model(str(QWEN))
    file = toy_gguf(tmp_path / "toy.gguf", like_qwen, no_rope_layer_interval=5)
    assert models.load_model(str(file)).config.layers == like_qwen.config.layers
    assert not caplog.records


def test_a_key_that_only_another_family_reads_is_refused(toy, tmp_path):
    folder = toy_folder(tmp_path, model_type="qwen3", no_rope_layer_interval=2)
    with pytest.raises(ValueError, match="not supported: no_rope_layer_interval 2"):
        models.load_model(str(folder))


def test_families_that_are_not_there_are_told(toy, tmp_path):
    with pytest.raises(ValueError, match=r"family 'wobble'; supported are llama, mistral, qwen2, .*, toy"):
        models.load_model(str(toy_folder(tmp_path, model_type="wobble")))


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        ((LayerKind(ROPE),) * 2, {"max_positions": 64, "rope_theta": 1e6, "rope_scaling": None}),
        ((LayerKind(ROPE), WINDOW), {"max_positions": 64, "layer_kinds": (LayerKind(ROPE), WINDOW)}),
        (
            (LayerKind(ROPE), LayerKind(ROPE, window=64)),
            {"max_positions": 64, "rope_theta": 1e6, "rope_scaling": None},
        ),
        (
            (LayerKind(ROPE), LayerKind(None)),
            {"max_positions": 64, "layer_kinds": (LayerKind(ROPE), LayerKind(None))},
        ),
        ((LayerKind(ROPE, scale=2.0),), {"max_positions": 64, "layer_kinds": (LayerKind(ROPE, scale=2.0),)}),
        ((LayerKind(None),), {"max_positions": 64, "layer_kinds": (LayerKind(None),)}),
    ],
)
def test_kinds_become_fields(kinds, fields):
    """One rope where that says all; a window of all positions is none."""
    assert layer_fields(kinds, 64) == fields


def test_every_family_has_a_format_and_sizes_that_fit_it():
    names = [size.name for family in families.FAMILIES for size in family.sizes]
    assert names == list(SIZES) and len({*names}) == len(names)
    for family in families.FAMILIES:
        assert family.huggingface or family.gguf
        for size in family.sizes:
            assert {part: getattr(size, part) for part in family.parts} == family.parts, size.name
    assert QWEN3.parts == {"qk_norm": True}


def test_readme_names_every_size():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Models") : text.index("## Command line")]
    assert {*re.findall(r"`([\w.-]+)`", table)} >= {*SIZES} - {"tiny"}
    assert {*families.gguf_families()} <= {*re.findall(r"`([\w-]+)`", table)}
