import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax import models
from retro_jax.models.formats.huggingface import config_from_json, download
from retro_jax.models.presets import SIZES
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
        ({"norms": "around"}, "norms 'around' is not supported; use one of before, after, both"),
        ({"activation": "relu"}, "activation 'relu' is not supported; use one of silu, gelu_tanh"),
        ({"residual_multiplier": 0.0}, r"residual_multiplier must be positive, got 0\.0"),
        ({"logits_soft_cap": -1.0}, r"logits_soft_cap must be positive, got -1\.0"),
        ({"joint_qk_norm": True}, "joint_qk_norm says what qk_norm is over, which is off"),
        ({"num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim must be even.* got 7"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        (
            {"rope_scaling": ("dynamic",)},
            "rope scaling 'dynamic' is not supported; use one of linear, llama3",
        ),
        ({"rope_scaling": ("yarn", 4.0)}, "needs original_positions, got None"),
        ({"rope_scaling": ("linear", 0.0)}, r"factor must be positive, got 0\.0"),
        (
            {"rope_scaling": ("factors",)},
            r"rope scaling has 0 factors, 8 rotary channels \(head_dim 8\) need 4",
        ),
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
    edit_config(folder, num_hidden_layers=3, layer_types=None)
    # 12 tensors of the third layer.
    with pytest.raises(ValueError, match="12 problems"):
        models.load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "family 'mamba'; supported are llama, mistral, "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"attention_bias": True, "quantization_config": {"bits": 4}},
            "attention_bias True, quantization_config",
        ),
        ({"rope_parameters": {"rope_type": "su"}}, "rope type 'su'; supported are default, linear"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling without 'long_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "alpha": 1.0}}, "not supported: alpha 1.0"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling without 'factor'"),
        (
            {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            "'linear' and type 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "has rope_scaling .* and rope_parameters .*; delete",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*'linear_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window of None"),
        (
            {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0, "layer_types": None},
            "window 0;",
        ),
        ({"quantization": {"bits": 4}}, r"not supported: quantization \{'bits': 4\}"),
        ({"final_logit_softcapping": 30.0, "logits_scaling": 8.0}, r"softcapping 30\.0, logits_scaling 8\.0"),
        ({"num_experts": 8}, "not supported: num_experts 8"),
        ({"is_causal": False}, "not supported: is_causal False"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size 30 is no multiple of 4 heads"),
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


SLIDING = {"sliding_window": 100, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("file", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 100}, (100, 100)),
        ("mistral", {"sliding_window": 1000}, (None, None)),  # more than the positions
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, (None, None)),
        ("qwen2", SLIDING | {"max_window_layers": 1, "layer_types": None}, (None, 100)),
        ("qwen2", SLIDING | {"max_window_layers": 2, "layer_types": None}, (None, None)),
        ("qwen2", SLIDING | {"layer_types": ["full_attention", "sliding_attention"]}, (None, 100)),
        ("qwen2", SLIDING, (None, None)),
        ("mistral", {"sliding_window": 100, "layer_types": ["full_attention"] * 2}, (100, 100)),
        ("qwen2.5-yarn", {"max_position_embeddings": 64}, (None, None)),
    ],
)
def test_windows_of_a_file_are_those_of_its_layers(file, changes, windows):
    raw = json.loads((golden.FOLDER / file / "config.json").read_text())
    config = config_from_json(raw | changes, file)
    assert config.max_positions == 256
    assert tuple(kind.window for kind in config.layers) == windows


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
LLAMA_3_1_ROPE = models.Rope(500_000.0, models.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
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


@pytest.mark.parametrize(
    ("family", "key", "fields"),
    [
        ("llama", "num_key_value_heads", {"num_kv_heads": 64}),
        ("mistral", "num_key_value_heads", {"num_kv_heads": 8}),
        ("mistral", "sliding_window", {"layer_kinds": (models.LayerKind(LLAMA_3_1_ROPE, 4096),) * 32}),
        ("qwen2", "num_key_value_heads", {"num_kv_heads": 32}),
        ("qwen3", "head_dim", {"head_dim": 128}),
        ("llama", "head_dim", {"head_dim": 64}),
        ("llama", "tie_word_embeddings", {"tie_embeddings": False}),
        ("llama", "rope_theta", {"rope_theta": 10_000.0}),
    ],
)
def test_missing_keys_are_what_transformers_takes(family, key, fields):
    raw = LLAMA_3_1_8B | {"model_type": family, "num_attention_heads": 64, "sliding_window": None}
    config = config_from_json({name: value for name, value in raw.items() if name != key}, "m")
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"type": "linear", "factor": 2.0}, models.RopeScaling("linear", 2.0)),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, models.RopeScaling("linear", 2.0)),
        ({"rope_type": "default", "mscale": None, "finetuned": True}, None),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            models.RopeScaling(
                "yarn", 4.0, 64, attention_factor=(1 + 0.1 * np.log(4.0)) / (1 + 0.05 * np.log(4.0))
            ),
        ),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 2.0}, models.RopeScaling("yarn", 4.0, 64)),
    ],
)
def test_spellings_of_rotary_scaling(rope, scaling):
    raw = LLAMA_3_1_8B | {"original_max_position_embeddings": 64}
    assert config_from_json(raw | {"rope_scaling": rope}, "m").rope_scaling == scaling
    assert (
        config_from_json(raw | {"rope_scaling": None, "rope_parameters": rope}, "m").rope_scaling == scaling
    )


def test_unknown_keys_are_reported_once_and_harmless_ones_not(caplog):
    harmless = {
        "attention_dropout": 0.1, "_name_or_path": "a", "bos_token_id": 1, "use_cache": True,
        "temperature": 0.6,
        "unsloth_version": "1", "auto_map": None, "quantization_config": None, "num_experts": 0,
        "hidden_act": "swish", "torch_dtype": "torch.bfloat16", "pretraining_tp": 2,
    }  # fmt: skip
    assert config_from_json(LLAMA_3_1_8B | harmless, "m").dtype == "bfloat16"
    assert not caplog.records
    config_from_json(LLAMA_3_1_8B | {"wobble": 1, "auto_map": {"AutoModel": "x"}}, "m")
    assert [record.getMessage() for record in caplog.records] == [
        "config.json of m: unknown keys are ignored: wobble, auto_map"
    ]
