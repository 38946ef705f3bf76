"""Qwen3 with experts, such as Qwen3-30B-A3B."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.families.family import (
    EXPERT_KEYS,
    Family,
    FileFormat,
    LayerKinds,
    gguf_experts,
    gguf_kinds,
    stated_experts,
)
from retro_jax.models.families.qwen3 import QWEN3


def _fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    sizes = keys["num_experts_per_tok"], keys["moe_intermediate_size"]
    experts = Experts(stated_experts(keys, default=128), *sizes, normalized=keys["norm_topk_prob"])
    return {"experts": experts}


def _some_layers(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    """Layers that mlp_only_layers names, or that decoder_sparse_step passes over, are dense."""
    dense, step = keys["mlp_only_layers"] or (), keys["decoder_sparse_step"]
    return tuple(
        kind if index in dense or (index + 1) % step else replace(kind, mlp="experts")
        for index, kind in enumerate(kinds)
    )


QWEN3_MOE = Family(
    huggingface=FileFormat(
        "qwen3_moe",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        keys=EXPERT_KEYS
        | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
        layer_kinds=_some_layers,
        fields=_fields,
    ),
    gguf=FileFormat("qwen3moe", keys=EXPERT_KEYS, layer_kinds=gguf_kinds, fields=gguf_experts),
    parts=QWEN3.parts,
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig(
            "qwen3-30b-a3b", 151936, 48, 32, 4, 128, 2048, 6144, 40960,
            rope_theta=1e6, norm_eps=1e-6, qk_norm=True, dtype="bfloat16", experts=Experts(128, 8, 768),
        ),
    ),
)  # fmt: skip
