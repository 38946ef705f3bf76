"""Mistral; its GGUF files have the architecture of Llama's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from retro_jax.models.config import ModelConfig
from retro_jax.models.families.family import Family, FileFormat, LayerKinds


def _window_in_every_layer(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    """Mistral's window holds in every layer, whatever layer_types says."""
    window = keys["sliding_window"] if keys.get("use_sliding_window", True) else None
    return tuple(replace(kind, window=window) for kind in kinds)


MISTRAL = Family(
    huggingface=FileFormat(
        "mistral",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        layer_kinds=_window_in_every_layer,
    ),
    # Version 0.3, without a sliding window.
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig(
            "mistral-7b", 32768, 32, 32, 8, 128, 4096, 14336, 32768, rope_theta=1e6, dtype="bfloat16"
        ),
    ),
)
