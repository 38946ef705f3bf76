"""What files of published models say becomes the sizes that `random:NAME` has; rules that files leave out."""

import dataclasses
import json
import math
import re
import shutil

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax import models
from retro_jax.models import LayerKind, Rope
from retro_jax.models.families import GEMMA3, gguf_families
from retro_jax.models.formats.gguf_config import config_from_metadata
from retro_jax.models.formats.huggingface_config import config_from_json
from retro_jax.models.formats.weights import separate_weights
from retro_jax.models.joined import joined_fields
from retro_jax.models.presets import SIZES
from tests.models import golden

LINEAR = {"factor": 8.0, "rope_type": "linear"}
# The keys that matter here, and some that have no effect, as published.
GEMMA3_1B = {
    "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B_TEXT = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": LINEAR, "sliding_window": 1024,
}  # fmt: skip
OLMO2_7B = {
    "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}  # fmt: skip
PHI4 = {
    "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu",
    "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 100352,
}  # fmt: skip
LONGROPE = SIZES["phi4-mini"].layers[0].rope.scaling
PHI4_MINI = PHI4 | {
    "full_attn_mod": 1, "hidden_size": 3072, "interpolate_factor": 1, "intermediate_size": 8192,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "sliding_window": 262144,
    "rope_scaling": {
        "long_factor": [1, *LONGROPE.factors[1:]], "short_factor": [1.0] * 48, "type": "longrope",
    },
    "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
    "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 128256,
}  # fmt: skip
GRANITE_2B = {
    "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 49159,
}  # fmt: skip


def contained(**text) -> dict:
    """config.json of a Gemma 3 beside its vision model."""
    return {
        "model_type": "gemma3", "eos_token_id": [1, 106], "image_token_index": 262144,
        "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": GEMMA3_4B_TEXT | text,
    }  # fmt: skip


PUBLISHED = {
    "gemma3-1b": GEMMA3_1B,
    "gemma3-270m": GEMMA3_1B
    | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "_sliding_window_pattern": 6,
        "sliding_window_pattern": None, "use_bidirectional_attention": False,
    },
    "gemma3-4b": contained(),
    "gemma3-12b": contained(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48,
        num_key_value_heads=8,
    ),
    "gemma3-27b": contained(
        head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_hidden_layers=62,
        num_key_value_heads=16, query_pre_attn_scalar=168,
    ),
    "olmo2-7b": OLMO2_7B,
    "phi4": PHI4,
    "phi4-mini": PHI4_MINI,
    "smollm3-3b": SMOLLM3,
    "granite3.3-2b": GRANITE_2B,
    "granite3.3-8b": GRANITE_2B
    | {
        "attention_multiplier": 0.0078125, "hidden_size": 4096, "intermediate_size": 12800,
        "logits_scaling": 16.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_named_sizes(name, caplog):
    assert config_from_json(PUBLISHED[name], name) == SIZES[name]
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gemma3-270m", 268_098_176),
        ("olmo2-7b", 7_298_617_344),
        ("phi4-mini", 3_836_021_760),
        ("smollm3-3b", 3_075_098_624),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("olmoe-1b-7b", 6_919_161_856),
        ("gpt-oss-20b", 20_914_757_184),
    ],
)
def test_sizes_have_as_many_weights_as_published(name, count):
    shapes = jax.eval_shape(lambda: models.random_params(SIZES[name], jax.random.key(0)))
    assert sum(math.prod(weight.shape) for weight in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (GEMMA3_1B, {"hidden_activation": "gelu"}, "not supported: hidden_activation 'gelu'"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, r"not supported: attn_logit_softcapping 50\.0"),
        (
            GEMMA3_1B,
            {"rope_parameters": {"sliding_attention": {}, "chunked_attention": {}}},
            "rotary parameters of chunked_attention beside those of layer types",
        ),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (contained(), {"text_config": {}}, "config.json of m has no text_config"),
        (contained(), {"quantization_config": {"bits": 4}}, "not supported: quantization_config"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; num_hidden_layers 36 needs one"),
        (SMOLLM3, {"num_hidden_layers": None}, "has no num_hidden_layers"),
        (SMOLLM3, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        (PHI4_MINI, {"partial_rotary_factor": 0.5}, "has 48 factors, 64 rotary channels .* need 32"),
        (GRANITE_2B, {"logits_scaling": -8.0}, r"logits_divisor must be positive, got -8\.0"),
        (OLMO2_7B, {"clip_qkv": 8.0}, r"not supported: clip_qkv 8\.0"),
    ],
)
def test_what_is_not_computed_is_refused(raw, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(raw | changes, "m")


def test_layers_of_smollm3_where_a_file_says_less():
    """By interval; a window is that of layers without a rotary embedding."""
    less = SMOLLM3 | {"no_rope_layers": None, "layer_types": None, "num_hidden_layers": 3}
    less |= {"no_rope_layer_interval": 2}
    rope = Rope(5e6)
    assert [kind.rope for kind in config_from_json(less, "m").layers] == [rope, None, rope]
    sliding = config_from_json(less | {"use_sliding_window": True, "sliding_window": 100}, "m")
    assert sliding.max_positions == 100 or [kind.window for kind in sliding.layers] == [None, 100, None]
    none = less | {"no_rope_layer_interval": 4, "use_sliding_window": True, "sliding_window": 100}
    assert config_from_json(none, "m").max_positions == 65536


def gguf_kinds(architecture: str, layers: int, **keys) -> tuple[LayerKind, ...]:
    """The layers that metadata describe, before windows become a limit of positions."""
    form = gguf_families()[architecture].gguf
    kind = LayerKind(Rope(1e6), keys.get("attention.sliding_window"))
    return form.layer_kinds(form.complete(keys), (kind,) * layers)


def test_gemma3_by_llama_cpp():
    """Every sixth layer is full where no pattern is stated; the 27B's scale is not in the file."""
    sizes = {"embedding_length": 5376, "attention.head_count": 32, "attention.key_length": 128}
    sizes |= {"attention.sliding_window": 1024}
    local, full = LayerKind(Rope(10_000.0), 1024), LayerKind(Rope(1e6))
    assert gguf_kinds("gemma3", 12, **sizes) == ((local,) * 5 + (full,)) * 2
    listed = {"attention.sliding_window_pattern": [False, True]}
    assert gguf_kinds("gemma3", 2, **sizes, **listed) == (full, local)
    with pytest.raises(ValueError, match="has 2 entries; block_count 3 needs one for each layer"):
        gguf_kinds("gemma3", 3, **sizes, **listed)
    scales = {kind.scale for kind in gguf_kinds("gemma3", 62, **sizes)}
    assert scales == {kind.scale for kind in SIZES["gemma3-27b"].layers} == {168**-0.5}


def test_granite_by_llama_cpp():
    """A scale of zero is none, and a flag of the rope switches it off."""
    assert {*gguf_kinds("granite", 2, **{"attention.scale": 0.0})} == {LayerKind(Rope(1e6))}
    without = gguf_kinds("granite", 2, **{"attention.scale": 0.5, "rope.scaling.finetuned": False})
    assert {*without} == {LayerKind(None, scale=0.5)}


def test_parts_of_a_gguf_that_are_not_computed_are_refused():
    """OLMo 3 has the architecture of OLMo 2."""
    metadata = {"general.architecture": "olmo2", "olmo2.attention.sliding_window": 64}
    metadata |= {"olmo2.attention.sliding_window_pattern": [True, False]}
    with pytest.raises(ValueError, match=r"olmo2\.attention\.sliding_window_pattern \[True, False\]"):
        config_from_metadata(metadata, {}, {}, "m.gguf", "float32")


def test_joined_matrices_that_are_missing_or_of_another_size_are_named(tmp_path):
    folder = shutil.copytree(golden.FOLDER / "phi3", tmp_path / "phi3")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.qkv_proj.weight"]
    weights["model.layers.1.mlp.gate_up_proj.weight"] = np.zeros((47, 32), np.float16)
    weights["model.layers.1.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float16)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="3 problems") as error:
        models.load_model(str(folder))
    for problem in (
        "missing: model.layers.0.self_attn.qkv_proj.weight (64, 32)",
        "unexpected: model.layers.1.self_attn.q_proj.weight (32, 32)",
        "wrong shape: model.layers.1.mlp.gate_up_proj.weight is (47, 32), the configuration needs (48, 32)",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"), [("", "language_model."), ("model.", "model.language_model.")], ids=["first", "later"]
)
def test_a_language_model_beside_a_vision_model(tmp_path, caplog, old, new):
    """Both layouts that transformers has written; what is not there is named as it is called there."""
    plain = models.load_model(str(golden.FOLDER / "gemma3"))
    folder = shutil.copytree(golden.FOLDER / "gemma3", tmp_path / "gemma3")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "dtype": text.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(outer))
    weights = load_file(folder / "model.safetensors")
    weights = {new + name.removeprefix(old): weight for name, weight in weights.items()}
    pictures = {"vision_tower.patch.weight": np.zeros((2, 2), np.float32)}
    save_file(weights | pictures, folder / "model.safetensors")
    model = models.load_model(str(folder))
    assert model.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, model.params, plain.params)
    assert "1 weights of other parts than the language model are left out: vision_tower.patch" in caplog.text
    lost = new + "model.norm.weight".removeprefix(old)
    save_file(
        {name: weight for name, weight in weights.items() if name != lost}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match="1 problems") as error:
        models.load_model(str(folder))
    assert f"missing: {lost}" in str(error.value)


EXPERTS = ("qwen3moe", "olmoe", "gpt-oss")


@pytest.mark.parametrize("architecture", ["gemma3", "olmo2", "phi3", "smollm3", "granite", *EXPERTS])
def test_every_weight_has_llama_cpps_name(architecture):
    config = models.load_model(str(golden.FOLDER / f"{architecture}.gguf")).config
    table = gguf.MODEL_TENSORS[getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_"))]
    known = {gguf.TENSOR_NAMES[tensor].format(bid="{i}") for tensor in table}
    params = jax.eval_shape(lambda: models.random_params(config, jax.random.key(0)))
    names = gguf_families()[architecture].names
    joined = [field for field in joined_fields(config) if f"layers.{{i}}.{field}" in names]
    weights = jax.eval_shape(lambda params: separate_weights(params, config, joined), params)
    used = {names[re.sub(r"\d+", "{i}", path, count=1)].gguf.rpartition(".")[0] for path in weights}
    assert used <= known and len(used) > 7


def test_norms_are_stored_less_one_in_one_format_only():
    assert (GEMMA3.huggingface.norm_offset, GEMMA3.gguf.norm_offset) == (1.0, 0.0)
    sizes = dataclasses.replace(SIZES["gemma3-1b"], num_layers=6, layer_kinds=SIZES["gemma3-1b"].layers[:6])
    shapes = jax.eval_shape(lambda: models.random_params(sizes, jax.random.key(0)))
    assert {str(shapes.layers[0].attn_norm.dtype), str(shapes.layers[0].wo.dtype)} == {"float32", "bfloat16"}
