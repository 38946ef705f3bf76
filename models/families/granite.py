"""Granite 3: what is added to the residual stream, embeddings, products and logits have factors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from retro_jax.models.config import LayerKind, ModelConfig, Rope
from retro_jax.models.families.family import Family, FileFormat, LayerKinds, layer_fields


def _scaled(kinds: LayerKinds, scale: float | int | None) -> LayerKinds:
    return tuple(replace(kind, scale=scale) for kind in kinds)


def _gguf_kinds(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    if not keys["rope.scaling.finetuned"]:  # llama.cpp's sign for a Granite without rotary embedding
        kinds = tuple(replace(kind, rope=None) for kind in kinds)
    return _scaled(kinds, keys.get("attention.scale") or None)


_MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_embeddings": True}


def _size(name: str, sizes: tuple[int, ...], divisor: float) -> ModelConfig:
    _, layers, _, _, head_dim, _, _ = sizes
    kinds = _scaled((LayerKind(Rope(1e7)),) * layers, 1 / head_dim)
    fields = _MULTIPLIERS | layer_fields(kinds, 131072)
    return ModelConfig(name, *sizes, logits_divisor=divisor, dtype="bfloat16", **fields)


GRANITE = Family(
    huggingface=FileFormat(
        "granite",
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        keys=frozenset(
            {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"}
        ),
        layer_kinds=lambda keys, kinds: _scaled(kinds, keys["attention_multiplier"]),
        fields=lambda keys: {
            "embedding_multiplier": keys["embedding_multiplier"],
            "residual_multiplier": keys["residual_multiplier"],
            "logits_divisor": keys["logits_scaling"],
        },
    ),
    gguf=FileFormat(
        "granite",
        defaults={"rope.scaling.finetuned": True},
        keys=frozenset(
            {"attention.scale", "embedding_scale", "residual_scale", "logit_scale", "rope.scaling.finetuned"}
        ),
        layer_kinds=_gguf_kinds,
        fields=lambda keys: {
            "embedding_multiplier": keys.get("embedding_scale") or 1.0,
            "residual_multiplier": keys.get("residual_scale") or 1.0,
            "logits_divisor": keys.get("logit_scale") or 1.0,
        },
    ),
    gguf_interleaved=True,
    sizes=(
        # name, (V, L, N, K, D, M, F), divisor of logits
        _size("granite3.3-2b", (49159, 40, 32, 8, 64, 2048, 8192), 8.0),
        _size("granite3.3-8b", (49159, 40, 32, 8, 128, 4096, 12800), 16.0),
    ),
)
