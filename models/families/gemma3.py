"""Gemma 3: five layers with a sliding window and a rope of their own to each with full attention.

Norms stand before and after attention and mlp, and are stored less one; embeddings are scaled. The larger
models come with a vision model, which is left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from retro_jax.models.config import LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.families.family import (
    NAMES,
    NORMS_AFTER,
    Container,
    Family,
    FileFormat,
    LayerKinds,
    layer_fields,
    layer_names,
)

_PERIOD = 6
"""Every so many layers one has full attention, where a file says nothing else."""

_PARTS = {"norms": "both", "float32_norms": True, "qk_norm": True, "activation": "gelu_tanh"}

_KEYS = frozenset(
    {"rope_local_base_freq", "query_pre_attn_scalar", "sliding_window_pattern", "final_logit_softcapping"}
)


def _layer_types(keys: Mapping[str, Any]) -> list[str]:
    layers, period = range(keys["num_hidden_layers"]), keys["sliding_window_pattern"]
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in layers]


def _huggingface_kinds(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    # Each kind of layer has its rope, or, from transformers 4, the sliding ones' theta is a key of its own.
    if "sliding_attention" not in (keys.get("rope_parameters") or {}):
        kinds = _local_ropes(kinds, keys["rope_local_base_freq"])
    return _scaled(kinds, keys["query_pre_attn_scalar"], keys["head_dim"])


def _gguf_kinds(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    period = keys["attention.sliding_window_pattern"]
    if isinstance(period, list):
        if len(period) != len(kinds):
            raise ValueError(
                f"gemma3.attention.sliding_window_pattern has {len(period)} entries; block_count "
                f"{len(kinds)} needs one for each layer"
            )
        kinds = tuple(
            kind if slides else replace(kind, window=None) for kind, slides in zip(kinds, period, strict=True)
        )
    else:
        kinds = _every(period, kinds, keys.get("attention.sliding_window") or None)
    # llama.cpp's rule, as the file does not say: the 27B model's products are scaled by the width of a head
    # that its heads together would have.
    head_dim = keys["attention.key_length"]
    width = keys["embedding_length"] // keys["attention.head_count"] if len(kinds) == 62 else head_dim
    return _scaled(_local_ropes(kinds, keys["rope.freq_base_swa"]), width, head_dim)


def _every(period: int, kinds: LayerKinds, window: int | None) -> LayerKinds:
    """Every `period`-th layer has full attention."""
    return tuple(
        replace(kind, window=window if (index + 1) % period else None) for index, kind in enumerate(kinds)
    )


def _local_ropes(kinds: LayerKinds, theta: float | int) -> LayerKinds:
    """Layers with a window have a rope of their own, without scaling."""
    return tuple(kind if kind.window is None else replace(kind, rope=Rope(theta)) for kind in kinds)


def _scaled(kinds: LayerKinds, width: float | int, head_dim: int) -> LayerKinds:
    return kinds if width == head_dim else tuple(replace(kind, scale=width**-0.5) for kind in kinds)


_LINEAR = RopeScaling("linear", factor=8.0)


def _size(
    name: str, sizes: tuple[int, ...], positions: int, window: int, scaled: bool = True, scalar: int = 256
) -> ModelConfig:
    _, layers, _, _, head_dim, width, _ = sizes
    kinds = (LayerKind(Rope(1e6, _LINEAR if scaled else None)),) * layers
    kinds = _scaled(_local_ropes(_every(_PERIOD, kinds, window), 10_000.0), scalar, head_dim)
    fields = _PARTS | layer_fields(kinds, positions) | {"embedding_multiplier": width**0.5}
    return ModelConfig(name, *sizes, norm_eps=1e-6, tie_embeddings=True, dtype="bfloat16", **fields)


GEMMA3 = Family(
    huggingface=FileFormat(
        "gemma3_text",
        # Files of the larger models leave out what is as in transformers.
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": _PERIOD,
            "layer_types": _layer_types,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        keys=_KEYS,
        values={"hidden_activation": ("gelu_pytorch_tanh",)},
        layer_kinds=_huggingface_kinds,
        fields=lambda keys: {
            "embedding_multiplier": keys["hidden_size"] ** 0.5,
            "logits_soft_cap": keys.get("final_logit_softcapping") or None,
        },
        norm_offset=1.0,
        container=Container(
            "gemma3",
            prefixes=(("", "language_model."), ("model.", "model.language_model.")),
            others=(
                "vision_tower.",
                "multi_modal_projector.",
                "model.vision_tower.",
                "model.multi_modal_projector.",
            ),
        ),
    ),
    gguf=FileFormat(
        "gemma3",
        defaults={"attention.sliding_window_pattern": _PERIOD, "rope.freq_base_swa": 10_000.0},
        keys=frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping"}),
        layer_kinds=_gguf_kinds,
        fields=lambda keys: {
            "embedding_multiplier": keys["embedding_length"] ** 0.5,
            "logits_soft_cap": keys.get("final_logit_softcapping") or None,
        },
    ),
    parts=_PARTS,
    names=NAMES
    | NORMS_AFTER
    | layer_names(("mlp_norm", "pre_feedforward_layernorm.weight", "ffn_norm.weight")),
    sizes=(
        # name, (V, L, N, K, D, M, F), positions, window
        _size("gemma3-270m", (262144, 18, 4, 1, 256, 640, 2048), 32768, 512, scaled=False),
        _size("gemma3-1b", (262144, 26, 4, 1, 256, 1152, 6912), 32768, 512, scaled=False),
        _size("gemma3-4b", (262208, 34, 8, 4, 256, 2560, 10240), 131072, 1024),
        _size("gemma3-12b", (262208, 48, 16, 8, 256, 3840, 15360), 131072, 1024),
        _size("gemma3-27b", (262208, 62, 32, 16, 128, 5376, 21504), 131072, 1024, scalar=168),
    ),
)
