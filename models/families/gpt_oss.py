"""gpt-oss: experts, sinks, biases everywhere, and a sliding window in every other layer."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from retro_jax.models.config import Experts, LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.families.family import (
    EXPERT_KEYS,
    NAMES,
    Family,
    FileFormat,
    LayerKinds,
    gguf_experts,
    layer_names,
    stated_experts,
)

_EXPERTS = {"biases": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}
_PARTS = {"qkv_bias": True, "output_bias": True}
_NAMES = layer_names(
    ("mlp_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("experts.router", "mlp.router.weight", "ffn_gate_inp.weight"),
    ("experts.router_bias", "mlp.router.bias", "ffn_gate_inp.bias"),
    ("experts.gate", "mlp.experts.gate_up_proj/gate", "ffn_gate_exps.weight"),
    ("experts.up", "mlp.experts.gate_up_proj/up", "ffn_up_exps.weight"),
    ("experts.down", "mlp.experts.down_proj", "ffn_down_exps.weight"),
    ("experts.gate_bias", "mlp.experts.gate_up_proj_bias/gate", "ffn_gate_exps.bias"),
    ("experts.up_bias", "mlp.experts.gate_up_proj_bias/up", "ffn_up_exps.bias"),
    ("experts.down_bias", "mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
)


def _alternating(keys: Mapping[str, Any]) -> list[str]:
    """The first layer slides, the second does not, and so on."""
    kinds = ["sliding_attention", "full_attention"] * keys["num_hidden_layers"]
    return kinds[: keys["num_hidden_layers"]]


def _fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    method = (keys.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ValueError(f"quantization {method!r} is not supported for gpt-oss; use mxfp4 or none")
    if not keys["attention_bias"]:
        raise ValueError("attention_bias False is not supported for gpt-oss, whose attention has biases")
    sizes = stated_experts(keys, default=128), keys["num_experts_per_tok"], keys["intermediate_size"]
    gates = {name: keys[name] for name in ("swiglu_limit", "swiglu_alpha")}
    return {"experts": Experts(*sizes, **_EXPERTS | gates)}


def _with_sinks(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    return tuple(replace(kind, sinks=True, mlp="experts") for kind in kinds)


def _gguf_kinds(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    """The metadata say neither which layers slide nor that the ramp of YaRN has no whole ends."""
    found = []
    for index, kind in enumerate(_with_sinks(keys, kinds)):
        scaling = kind.rope.scaling and replace(kind.rope.scaling, truncate=False)
        window = None if index % 2 else kind.window
        found.append(replace(kind, rope=replace(kind.rope, scaling=scaling), window=window))
    return tuple(found)


_SCALING = RopeScaling("yarn", factor=32.0, original_positions=4096, truncate=False)


def _size(name: str, layers: int, experts: int) -> ModelConfig:
    kind = LayerKind(Rope(150_000.0, _SCALING), sinks=True, mlp="experts")
    kinds = tuple(replace(kind, window=None if index % 2 else 128) for index in range(layers))
    return ModelConfig(
        name, 201088, layers, 64, 8, 64, 2880, 2880, 131072,
        dtype="bfloat16", layer_kinds=kinds, experts=Experts(experts, 4, 2880, **_EXPERTS), **_PARTS,
    )  # fmt: skip


GPT_OSS = Family(
    huggingface=FileFormat(
        "gpt_oss",
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "sliding_window": 128,
            "attention_bias": True,
            "layer_types": _alternating,
            "rope_theta": 150_000.0,
            "dtype": lambda keys: keys.get("torch_dtype", "bfloat16"),
        },
        keys=EXPERT_KEYS
        | {
            "swiglu_limit", "swiglu_alpha", "experts_per_token", "initial_context_length",
            "quantization_config", "attention_bias",
        },
        layer_kinds=_with_sinks,
        fields=_fields,
        packed_experts=True,
    ),
    gguf=FileFormat(
        "gpt-oss", keys=EXPERT_KEYS, layer_kinds=_gguf_kinds, fields=partial(gguf_experts, **_EXPERTS)
    ),
    parts=_PARTS,
    names=NAMES | _NAMES,
    sizes=(_size("gpt-oss-20b", 24, 32), _size("gpt-oss-120b", 36, 128)),
)  # fmt: skip
