"""What files of published mixtures of experts say becomes the sizes of `random:NAME`; what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax import models
from retro_jax.models import Experts, LayerKind
from retro_jax.models.formats.huggingface_config import config_from_json
from retro_jax.models.formats.packed_experts import dequantize
from retro_jax.models.presets import SIZES
from tests.models import golden

# The keys that matter here, and some that have no effect, as published.
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
    "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
OLMOE_1B_7B = {
    "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 50304,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
PUBLISHED = {
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "olmoe-1b-7b": OLMOE_1B_7B,
    "gpt-oss-20b": GPT_OSS_20B,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_sizes(name, caplog):
    config = config_from_json(PUBLISHED[name], name)
    assert config.layers == SIZES[name].layers
    assert dataclasses.replace(config, layer_kinds=None, rope_theta=1.0, rope_scaling=None) == (
        dataclasses.replace(SIZES[name], layer_kinds=None, rope_theta=1.0, rope_scaling=None)
    )
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "gpt-oss-20b",
            {"quantization_config": {"quant_method": "awq"}},
            "quantization 'awq' is not support",
        ),
        ("gpt-oss-20b", {"attention_bias": False}, "attention_bias False is not supported for gpt-oss"),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}, r"not supported: clip_qkv 8\.0"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "cannot go through 129 of 128 experts"),
        ("mixtral-8x7b", {"model_type": "mistral"}, "not supported: num_local_experts 8"),
    ],
)
def test_what_experts_are_not_supported(name, keys, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(PUBLISHED[name] | keys, name)


def test_some_layers_are_dense():
    keys = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts": None}
    config = config_from_json(QWEN3_30B_A3B | keys, "some")
    rope = config.layers[0].rope
    dense, experts = LayerKind(rope), LayerKind(rope, mlp="experts")
    assert config.layers == (dense, experts, dense, dense, dense, experts)
    assert config.experts == Experts(128, 8, 768)  # as many as transformers takes a missing key for
    assert (config.parts, config.hidden_widths) == (
        4, {"hidden_width": 6144, "hidden_width of experts": 768},
    )  # fmt: skip


def test_codes_of_mxfp4_are_their_numbers():
    """By hand: 0.5 and -6 in units of 2, in the first byte; zeros after them."""
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.array([[[128], [126]]], np.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0xF1, 0x25
    numbers = dequantize(blocks, scales)
    assert numbers.shape == (1, 2, 32) and numbers.dtype == np.float32
    assert numbers[0, 0, :2].tolist() == [1.0, -12.0] and numbers[0, 1, 30:].tolist() == [1.5, 0.5]
    assert np.count_nonzero(numbers) == 4


def test_all_that_is_wrong_with_packed_experts_is_told_at_once(tmp_path):
    folder = shutil.copytree(golden.FOLDER / "gpt-oss", tmp_path / "gpt-oss")
    weights = load_file(folder / "model.safetensors")
    prefix = "model.layers.{}.mlp.experts.".format
    del weights[f"{prefix(0)}gate_up_proj_scales"], weights[f"{prefix(0)}down_proj_bias"]
    weights[f"{prefix(1)}gate_up_proj_blocks"] = weights[f"{prefix(1)}gate_up_proj_blocks"][..., :8].copy()
    weights[f"{prefix(1)}down_proj_scales"] = weights[f"{prefix(1)}down_proj_scales"].astype(np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="4 problems") as error:
        models.load_model(str(folder))
    for problem in (
        f"missing: {prefix(0)}gate_up_proj_scales, of {prefix(0)}gate_up_proj_blocks",
        f"missing: {prefix(0)}down_proj_bias (3, 32)",
        f"wrong shape: {prefix(1)}gate_up_proj_blocks is (3, 64, 1, 8), {prefix(1)}gate_up_proj_scales needs",
        f"unsupported quantisation: {prefix(1)}down_proj_blocks is U8 and {prefix(1)}down_proj_scales F32",
    ):
        assert problem in str(error.value)


def test_an_expert_too_few_is_told(tmp_path):
    folder = shutil.copytree(golden.FOLDER / "mixtral", tmp_path / "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(ValueError, match="8 problems") as error:
        models.load_model(str(folder))
    for problem in (
        "missing: model.layers.1.block_sparse_moe.experts.4.w2.weight (16, 12)",
        "wrong shape: model.layers.0.block_sparse_moe.gate.weight is (4, 16), the configuration needs (5, ",
    ):
        assert problem in str(error.value)
