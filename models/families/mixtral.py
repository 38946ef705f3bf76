"""Mixtral; its GGUF files have the architecture of Llama's."""

from collections.abc import Mapping
from typing import Any

from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.families.family import (
    EXPERT_KEYS,
    NAMES,
    Family,
    FileFormat,
    WeightName,
    stated_experts,
)


def _experts(keys: Mapping[str, Any]) -> Experts:
    return Experts(stated_experts(keys, default=8), keys["num_experts_per_tok"], keys["intermediate_size"])


_PREFIX = "model.layers.{i}.block_sparse_moe."
_NAMES = {
    f"layers.{{i}}.experts.{parameter}": WeightName(_PREFIX + huggingface, f"blk.{{i}}.{gguf}")
    for parameter, huggingface, gguf in (
        ("router", "gate.weight", "ffn_gate_inp.weight"),
        ("gate", "experts.{e}.w1.weight", "ffn_gate_exps.weight"),
        ("up", "experts.{e}.w3.weight", "ffn_up_exps.weight"),
        ("down", "experts.{e}.w2.weight", "ffn_down_exps.weight"),
    )
}

MIXTRAL = Family(
    huggingface=FileFormat(
        "mixtral",
        defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
        keys=EXPERT_KEYS,
        experts=_experts,
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
