"""Mixtral; its GGUF files have the architecture of Llama's."""

from collections.abc import Mapping
from typing import Any

from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.families.family import (
    EXPERT_KEYS,
    NAMES,
    Family,
    FileFormat,
    in_all_layers,
    layer_names,
    stated_experts,
)


def _fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    experts = Experts(stated_experts(keys, default=8), keys["num_experts_per_tok"], keys["intermediate_size"])
    return {"experts": experts}


_NAMES = layer_names(
    ("experts.router", "block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
    ("experts.gate", "block_sparse_moe.experts.{e}.w1.weight", "ffn_gate_exps.weight"),
    ("experts.up", "block_sparse_moe.experts.{e}.w3.weight", "ffn_up_exps.weight"),
    ("experts.down", "block_sparse_moe.experts.{e}.w2.weight", "ffn_down_exps.weight"),
)

MIXTRAL = Family(
    huggingface=FileFormat(
        "mixtral",
        defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
        keys=EXPERT_KEYS,
        layer_kinds=in_all_layers,
        fields=_fields,
    ),
    names=NAMES | _NAMES,
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig(
            "mixtral-8x7b", 32000, 32, 32, 8, 128, 4096, 14336, 32768,
            rope_theta=1e6, dtype="bfloat16", experts=Experts(8, 2, 14336),
        ),
    ),
)  # fmt: skip
