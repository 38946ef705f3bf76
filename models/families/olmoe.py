"""OLMoE: norms of queries and keys are over all heads; experts' shares are those of a softmax over all."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.families.family import (
    EXPERT_KEYS,
    Family,
    FileFormat,
    gguf_experts,
    gguf_kinds,
    in_all_layers,
    stated_experts,
)

_PARTS = {"qk_norm": True, "joint_qk_norm": True}


def _fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    sizes = keys["num_experts_per_tok"], keys["intermediate_size"]
    experts = Experts(stated_experts(keys, default=64), *sizes, normalized=keys["norm_topk_prob"])
    return {"experts": experts}


OLMOE = Family(
    huggingface=FileFormat(
        "olmoe",
        defaults={"num_key_value_heads": None, "num_experts_per_tok": 8, "norm_topk_prob": False},
        keys=EXPERT_KEYS | {"norm_topk_prob"},
        layer_kinds=in_all_layers,
        fields=_fields,
    ),
    gguf=FileFormat(
        "olmoe", keys=EXPERT_KEYS, layer_kinds=gguf_kinds, fields=partial(gguf_experts, normalized=False)
    ),
    parts=_PARTS,
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig(
            "olmoe-1b-7b", 50304, 16, 16, 16, 128, 2048, 1024, 4096,
            dtype="bfloat16", experts=Experts(64, 8, 1024, normalized=False), **_PARTS,
        ),
    ),
)  # fmt: skip
