"""SmolLM3: every fourth layer has no rotary embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from retro_jax.models.config import LayerKind, ModelConfig, Rope
from retro_jax.models.families.family import Family, FileFormat, LayerKinds, layer_fields

_PERIOD = 4


def _rotated(layers: int, period: int) -> list[bool]:
    """Which layers have a rotary embedding: every `period`-th has none."""
    return [(index + 1) % period != 0 for index in range(layers)]


def _layer_types(keys: Mapping[str, Any]) -> list[str]:
    """A window, where there is one, is that of the layers without a rotary embedding."""
    slides = keys["use_sliding_window"] and keys.get("sliding_window") is not None
    return [
        "sliding_attention" if slides and not rotated else "full_attention"
        for rotated in keys["no_rope_layers"][: keys["num_hidden_layers"]]
    ]


def _kinds(rotated: Sequence[bool | int], kinds: LayerKinds) -> LayerKinds:
    if len(rotated) < len(kinds):
        raise ValueError(
            f"no_rope_layers has {len(rotated)} entries; num_hidden_layers {len(kinds)} needs one for each"
        )
    return tuple(kind if has else replace(kind, rope=None) for kind, has in zip(kinds, rotated, strict=False))


_SIZE = {"norm_eps": 1e-6, "tie_embeddings": True, "dtype": "bfloat16"} | layer_fields(
    _kinds(_rotated(36, _PERIOD), (LayerKind(Rope(5e6)),) * 36), 65536
)

SMOLLM3 = Family(
    huggingface=FileFormat(
        "smollm3",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layer_interval": _PERIOD,
            # A list of those that have one, for all that its name says.
            "no_rope_layers": lambda keys: _rotated(
                keys["num_hidden_layers"], keys["no_rope_layer_interval"]
            ),
            "layer_types": _layer_types,
        },
        keys=frozenset({"no_rope_layer_interval", "no_rope_layers"}),
        layer_kinds=lambda keys, kinds: _kinds(keys["no_rope_layers"], kinds),
    ),
    gguf=FileFormat("smollm3", layer_kinds=lambda keys, kinds: _kinds(_rotated(len(kinds), _PERIOD), kinds)),
    gguf_interleaved=True,
    sizes=(
        # name, V, L, N, K, D, M, F
        ModelConfig("smollm3-3b", 128256, 36, 16, 4, 128, 2048, 11008, **_SIZE),
    ),
)
