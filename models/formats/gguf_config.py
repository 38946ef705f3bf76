"""Metadata of a GGUF file to a configuration. Every key is honoured, without effect, or refused.

What a missing key means is what llama.cpp takes it for, as the family says. A key that the format knows, and
that neither these tables nor the family's have, describes a part that is not computed here: it is refused,
unless its value switches the part off. Other keys under the architecture's name are reported and ignored.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from retro_jax.models.config import LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.families import gguf_families
from retro_jax.models.families.family import layer_fields

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

READ = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count",
        "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip
WITHOUT_EFFECT = frozenset({"rope.scaling.finetuned", "pooling_type", "classifier.output_labels"})
NEUTRAL = {
    "attention.causal": (True,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}
"""Values besides zero that switch a part off."""

_logger = logging.getLogger(__name__)


def _known_keys() -> frozenset[str]:
    """All keys of the format that belong to an architecture, without its name."""
    found, rooms = set(), [gguf.Keys]
    while rooms:
        for value in vars(rooms.pop()).values():
            if isinstance(value, type):
                rooms.append(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                found.add(value.removeprefix("{arch}."))
    return frozenset(found)


KNOWN = _known_keys()


def config_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, np.ndarray],
    source: str,
    dtype: str,
) -> ModelConfig:
    """Configuration of the model in a GGUF file.

    Args:
        metadata: keys and values of the file.
        shapes: of its tensors, slowest axis first; they tell which optional parts there are.
        rope_factors: (R/2,) divisors of the rotary frequencies for R rotated channels, by the names of the
            tensors that the file has of them.
        source: the file, for messages.
        dtype: of the configuration.

    Raises:
        ValueError: if the architecture or a part of it is not supported, or a needed key is missing.
    """
    architecture = metadata.get("general.architecture")
    families = gguf_families()
    if architecture not in families:
        raise ValueError(
            f"{source} has the architecture {architecture!r}; supported are {', '.join(families)}"
        )
    family = families[architecture]
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"{source} holds a {metadata['general.type']}, not a model")
    prefix = f"{architecture}."
    _check_keys(metadata, prefix, source, family.gguf.keys)
    keys = family.gguf.complete(
        {
            key.removeprefix(prefix): _shortest(value) if isinstance(value, float) else value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
    )

    def value(key: str, default=None):
        found = keys.get(key, default)
        if found is None:
            raise ValueError(f"{source} has no metadata key {architecture}.{key}")
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise ValueError(
                    f"{source} has {architecture}.{key} {found}; only equal layers are supported"
                )
            return found[0]
        return found

    def first(parameter: str) -> str:
        return family.names[parameter].gguf.format(i=0)

    embed = first("embed")
    if embed not in shapes:
        raise ValueError(f"{source} has no tensor {embed}")
    rows = shapes[embed][0]
    _check_rows(metadata, rows, embed, source)
    width, num_heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if key not in family.gguf.keys and value(key, head_dim) != head_dim:
            raise ValueError(
                f"{source} has {architecture}.{key} {value(key)}, only {head_dim} (D) is supported"
            )
    keys["attention.key_length"] = head_dim  # for the family, where the file leaves it out
    scaling = _rope_scaling(value, rope_factors, source)
    rotated = value("rope.dimension_count", head_dim)
    rope = Rope(value("rope.freq_base", 10_000.0), scaling, None if rotated == head_dim else rotated)
    kind = LayerKind(rope, value("attention.sliding_window", 0) or None)
    kinds = family.gguf.layer_kinds(keys, (kind,) * value("block_count"))
    positions = value("context_length")
    if scaling is not None and scaling.kind == "yarn" and value("rope.scaling.original_context_length", 0):
        positions = max(positions, int(scaling.factor * scaling.original_positions))
    return ModelConfig(
        name=metadata.get("general.name", Path(source).stem),
        vocab_size=rows,
        num_layers=value("block_count"),
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        width=width,
        hidden_width=value("feed_forward_length"),
        norm_eps=value("attention.layer_norm_rms_epsilon"),
        tie_embeddings=first("head") not in shapes,
        dtype=dtype,
        **{
            "qkv_bias": first("layers.{i}.bq") in shapes,
            "output_bias": first("layers.{i}.bo") in shapes,
            "qk_norm": first("layers.{i}.q_norm") in shapes,
            **family.parts,
            **family.gguf.fields(keys),
            **layer_fields(kinds, positions),
        },
    )


def _check_keys(metadata: Mapping[str, Any], prefix: str, source: str, own: frozenset[str]) -> None:
    """Refuses and reports keys that are read neither here nor, as its `own`, by the family."""
    refused, unknown = [], []
    for full, value in metadata.items():
        key = full.removeprefix(prefix)
        if key == full or key in READ | WITHOUT_EFFECT | own or value in NEUTRAL.get(key, ()):
            continue
        if key not in KNOWN:
            unknown.append(full)
        elif key == "attention.causal" or (any(value) if isinstance(value, list) else value):
            refused.append(f"{full} {value!r}")
    if refused:
        raise ValueError(f"{source} needs what is not supported: {', '.join(refused)}")
    if unknown:
        _logger.warning("%s: unknown metadata is ignored: %s", source, ", ".join(unknown))


def _check_rows(metadata: Mapping[str, Any], rows: int, embed: str, source: str) -> None:
    """Refuses a number of tokens that is not that of the embedding's rows."""
    key = f"{metadata['general.architecture']}.vocab_size"
    counts = {key: metadata.get(key, rows)}
    counts["tokenizer.ggml.tokens"] = len(metadata.get("tokenizer.ggml.tokens") or [None] * rows)
    for key, count in counts.items():
        if count != rows:
            raise ValueError(f"{source} has {count} tokens by {key}, but {rows} rows of {embed}")


def _shortest(number: float) -> float:
    """The decimal number that a float32 of the file was written from: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(number)))


def _rope_scaling(value, tensors: Mapping[str, np.ndarray], source: str) -> RopeScaling | None:
    kind = value("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(f"{source} has rope scaling {kind!r}; none, linear, yarn, longrope are supported")
    factors = tensors.get(ROPE_FACTORS)
    old, factor = value("rope.scale_linear", 0.0), value("rope.scaling.factor", 0.0)
    if old and factor and old != factor:
        raise ValueError(f"{source} has both rope.scaling.factor {factor} and rope.scale_linear {old}")
    factor = 1.0 if kind == "none" else factor or old or 1.0
    extrapolated = value("rope.scaling.yarn_ext_factor", -1.0)
    if extrapolated >= 0 and extrapolated != float(kind == "yarn"):
        raise ValueError(
            f"{source} has rope.scaling.yarn_ext_factor {extrapolated}; with scaling {kind!r} only "
            f"{float(kind == 'yarn')} is supported"
        )
    attention = value("rope.scaling.attn_factor", 1.0)
    if kind == "longrope" or {LONG_FACTORS, SHORT_FACTORS} & tensors.keys():
        if tensors.keys() != {LONG_FACTORS, SHORT_FACTORS} or kind == "yarn" or factor != 1.0:
            raise ValueError(
                f"{source} has rope scaling {kind!r} with factor {factor} and the tensors "
                f"{', '.join(tensors) or 'of no factors'}; longrope needs {LONG_FACTORS} and {SHORT_FACTORS} "
                "and no other factor"
            )
        long, short = (tuple(tensors[name].tolist()) for name in (LONG_FACTORS, SHORT_FACTORS))
        return RopeScaling(
            "longrope",
            original_positions=value("rope.scaling.original_context_length", value("context_length")),
            attention_factor=attention,
            factors=long,
            short_factors=short,
        )
    if kind == "yarn" and factor != 1.0:
        if factors is not None:
            raise ValueError(f"{source} has both {ROPE_FACTORS} and rope scaling 'yarn'; one is supported")
        # llama.cpp multiplies what YaRN's formula gives.
        stated = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_positions=value("rope.scaling.original_context_length", value("context_length")),
            beta_fast=value("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=value("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if attention == 1.0 else stated,
        )
    stated = None if attention == 1.0 else attention
    if factors is not None:
        divisors = tuple((factors * factor).tolist())
        return RopeScaling("factors", factors=divisors, attention_factor=stated)
    if factor == 1.0 and stated is None:
        return None
    return RopeScaling("linear", factor=factor, attention_factor=stated)
