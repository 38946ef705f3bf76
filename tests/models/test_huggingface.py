import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.huggingface import config_from_json, download
from models.presets import SIZES
from tests.models import golden

SHARDED, SINGLE = golden.FOLDER / "llama3.1-sharded", golden.FOLDER / "qwen2"
GGUF = golden.FOLDER / "gguf-qwen2.gguf"


def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / folder.name)


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["smollm3", "random", ""])
def test_unknown_model_names_every_form(name):
    with pytest.raises(
        ValueError, match=r"unknown model .*smollm2-135m.*folder.*\.gguf.*hub id.*random:NAME"
    ):
        models.load_model(name)


def test_unknown_size_names_the_sizes():
    with pytest.raises(ValueError, match=r"'gpt-5'.*llama3\.1-8b.*qwen3-8b"):
        models.load_model("random:gpt-5")


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype 'int4' is not supported; use one of float32, bfloat16"):
        models.load_model("random:tiny", dtype="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim must be even.* got 7"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        (
            {"rope_scaling": ("dynamic",)},
            "rope scaling 'dynamic' is not supported; use one of linear, llama3",
        ),
        ({"rope_scaling": ("yarn", 4.0)}, "needs original_positions, got None"),
        ({"rope_scaling": ("linear", 0.0)}, r"factor must be positive, got 0\.0"),
        ({"rope_scaling": ("factors",)}, "rope scaling has 0 factors, head_dim 8 needs 4"),
    ],
)
def test_impossible_configurations(changes, message):
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "width": 32}
    sizes |= {"name": "bad", "vocab_size": 96, "hidden_width": 64, "max_positions": 256}
    models.ModelConfig(**sizes)
    with pytest.raises(ValueError, match=message):
        if "rope_scaling" in changes:
            changes = {"rope_scaling": models.RopeScaling(*changes["rope_scaling"])}
        models.ModelConfig(**sizes | changes)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load_model(str(tmp_path))


def test_folder_without_weights(tmp_path):
    folder = copy(SINGLE, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        models.load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json(tmp_path, file):
    folder = copy(SHARDED, tmp_path)
    truncate(folder / file, 0.5)
    with pytest.raises(ValueError, match=rf"{file} is broken .*fetch it again"):
        models.load_model(str(folder))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
def test_truncated_safetensors(tmp_path, share):
    folder = copy(SINGLE, tmp_path)
    truncate(folder / "model.safetensors", share)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or broken .*fetch it again"):
        models.load_model(str(folder))


def test_missing_and_truncated_shards_are_named_together(tmp_path):
    folder = copy(SHARDED, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    truncate(folder / "model-00003-of-00003.safetensors", 0.9)
    with pytest.raises(ValueError, match="2 problems") as error:
        models.load_model(str(folder))
    assert "missing shard: " in str(error.value)
    assert "model-00003-of-00003.safetensors is truncated or broken" in str(error.value)


def test_every_mismatch_is_named_at_once(tmp_path):
    folder = copy(SINGLE, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.extra.weight"] = np.zeros((2, 3), np.float32)
    del weights["model.layers.1.self_attn.q_proj.bias"]
    weights["model.norm.weight"] = np.zeros(31, np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not match the configuration of qwen2, 3 problems") as error:
        models.load_model(str(folder))
    for problem in (
        "missing: model.layers.1.self_attn.q_proj.bias (32,)",
        "unexpected: model.extra.weight (2, 3)",
        "wrong shape: model.norm.weight is (31,), the configuration needs (32,)",
    ):
        assert problem in str(error.value)


def test_config_of_another_size(tmp_path):
    folder = copy(SINGLE, tmp_path)
    edit_config(folder, num_hidden_layers=3)
    # 12 tensors of the third layer.
    with pytest.raises(ValueError, match="12 problems"):
        models.load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "family 'mamba'; supported are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"attention_bias": True, "quantization_config": {"bits": 4}},
            "quantization_config.*attention_bias True",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope type 'longrope'; supported are default, linear",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "yarn .*mscale"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling without 'factor'"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported"),
    ],
)
def test_unsupported_parts(tmp_path, changes, message):
    folder = copy(SINGLE, tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        models.load_model(str(folder))


def test_config_without_needed_keys():
    with pytest.raises(ValueError, match=r"config\.json of model has no vocab_size, num_hidden_layers"):
        config_from_json({"model_type": "llama"}, "model")


@pytest.mark.parametrize(
    ("file", "changes", "positions"),
    [
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 1000}, 256),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 256),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, 100),
        ("qwen2.5-yarn", {"max_position_embeddings": 64}, 256),
    ],
)
def test_positions_end_where_the_model_would_differ(file, changes, positions):
    raw = json.loads((golden.FOLDER / file / "config.json").read_text())
    assert config_from_json(raw | changes, file).max_positions == positions


# The keys of config.json that matter here, as published (transformers 4).
LLAMA_3_1_8B = {
    "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
QWEN_2_5_7B = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


@pytest.mark.parametrize(("name", "raw"), [("llama3.1-8b", LLAMA_3_1_8B), ("qwen2.5-7b", QWEN_2_5_7B)])
def test_published_configurations_are_the_named_sizes(name, raw):
    assert config_from_json(raw, name) == SIZES[name]


def test_default_dtypes():
    dtypes = {path.name: models.load_model(str(path)).config.dtype for path in (SHARDED, SINGLE, GGUF)}
    assert dtypes == {SHARDED.name: "bfloat16", SINGLE.name: "float32", GGUF.name: "float32"}
    raw = json.loads((golden.FOLDER / "mistral" / "config.json").read_text())
    assert raw["dtype"] == "float16"
    assert config_from_json(raw, "mistral").dtype == "bfloat16"


def test_hub_out_of_reach(monkeypatch):
    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"(?s)could not fetch 'org/name'.*no connection.*give the folder"):
        models.load_model("org/name")


def test_hub_files_are_only_those_that_are_read(monkeypatch):
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(SINGLE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("org/name", "v1") == SINGLE
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1")
    assert models.load_model("org/name").config.name == "org/name"
    wanted = list(
        huggingface_hub.utils.filter_repo_objects(
            ["model-00001-of-00002.safetensors", "consolidated.safetensors", "original/x.pth", "config.json"],
            allow_patterns=asked["allow_patterns"],
        )
    )
    assert wanted == ["model-00001-of-00002.safetensors", "config.json"]


def test_load_progress_counts_tensors():
    calls = []
    models.load_model(str(SINGLE), progress=lambda *call: calls.append(call))
    assert calls[0] == ("load", 1, 26)
    assert calls[-1] == ("load", 26, 26)
