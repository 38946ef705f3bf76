"""config.json to a configuration. Every key is honoured, without effect, or refused.

What a missing key means is what transformers 5 takes it for, as the family says. Keys that are in none of the
tables, nor in the family's, are reported and ignored, unless they are about the rotary embedding: those are
refused.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from retro_jax.models.config import LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.families import huggingface_families
from retro_jax.models.families.family import FileFormat, LayerKinds, layer_fields

NEEDED = (
    "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
READ = {
    *NEEDED, "model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "tie_word_embeddings", "dtype", "torch_dtype", "eos_token_id",
}  # fmt: skip
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    "is_causal": (True,),
    "is_decoder": (True, False),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "rope_interleaved": (False,),
}
"""Values besides null with which a part is as it is computed here; other values are refused."""

OFF = {
    "attention_bias", "mlp_bias", "quantization_config", "quantization", "compression_config",
    "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier", "query_pre_attn_scalar",
    "clip_qkv",
    "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
    "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "use_qk_norm",
    "qk_layernorm", "use_parallel_residual", "parallel_attn",
    "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention", "use_mrope",
    "attention_sinks", "attn_temperature_tuning", "alibi", "per_layer_config", "pruned_heads",
}  # fmt: skip
"""Parts that are not computed here: refused unless false, zero, empty or null."""

WITHOUT_EFFECT = re.compile(
    r"_.*|.*_(token_id|dropout|pdrop|token|dropout_prob)|dropout|initializer_range|use_cache|transformers_version|"
    r"architectures|pretraining_tp|output_.*|return_dict.*|id2label|label2id|num_labels|problem_type|"
    r"chunk_size_feed_forward|name_or_path|attn_implementation|unsloth_.*|finetuning_task|"
    r"tokenizer_class|prefix|torchscript|use_bfloat16|use_flash_attention.*|tie_encoder_decoder|cross_attention_hidden_size|"
    r"remove_invalid_values|task_specific_params|model_max_length|max_sequence_length|"
    r"tokenizer_model_max_length|"
    # What older files keep of generation.
    r"do_sample|early_stopping|temperature|top_[kp]|typical_p|(max|min)_length|num_beams|num_beam_groups|"
    r"num_return_sequences|length_penalty|diversity_penalty|repetition_penalty|(encoder_)?no_repeat_ngram_size|"
    r"bad_words_ids|exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|tf_legacy_loss|"
    r"cache_implementation"
)
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor", "finetuned", "long_factor", "short_factor",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")
OUTER = {
    "dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "quantization_config", "quantization",
    "compression_config",
}  # fmt: skip
"""Keys of a container that hold for the language model in it."""

_logger = logging.getLogger(__name__)


def config_from_json(raw: Mapping[str, Any], name: str, dtype: str | None = None) -> ModelConfig:
    """Configuration from the contents of config.json, as written by transformers 4 or 5.

    Args:
        raw: contents of config.json.
        name: of the model.
        dtype: None: as the file says, bfloat16 for float16.

    Raises:
        ValueError: if the family or a part of the model is not supported, a needed key is missing, or keys
            contradict each other.
    """
    families = huggingface_families()
    if (kind := raw.get("model_type")) not in families:
        raise ValueError(f"{name} is of the family {kind!r}; supported are {', '.join(families)}")
    form, parts = families[kind].huggingface, families[kind].parts
    if form.container and kind == form.container.name:
        if not raw.get("text_config"):
            raise ValueError(f"config.json of {name} has no text_config")
        raw = {key: value for key, value in raw.items() if key in OUTER} | raw["text_config"]
    _check_keys(raw, name, form)
    missing = [key for key in NEEDED if raw.get(key, form.defaults.get(key)) is None]
    if missing:
        raise ValueError(f"config.json of {name} has no {', '.join(missing)}")
    raw = form.complete(raw)
    ropes = _ropes(raw, name, partial="partial_rotary_factor" in form.keys)
    kinds = form.layer_kinds(raw, _layer_kinds(raw, ropes, name))
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(f"{name} has no head_dim, and hidden_size {width} is no multiple of {heads} heads")
    return ModelConfig(
        name=name,
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or width // heads,
        width=width,
        hidden_width=raw["intermediate_size"],
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=bool(raw.get("tie_word_embeddings")),
        dtype=dtype or _stored_dtype(raw),
        **parts,
        **form.fields(raw),
        **layer_fields(kinds, _positions(raw, ropes.values())),
    )


def _check_keys(raw: Mapping[str, Any], name: str, form: FileFormat) -> None:
    """Refuses and reports keys that are read neither here nor by the family."""
    stated = {key: value for key, value in raw.items() if value is not None and key not in form.keys}
    neutral = NEUTRAL | form.values
    refused = [
        f"{key} {value!r}"
        for key, value in stated.items()
        if (key in OFF and value) or (key in neutral and value not in neutral[key])
    ]
    if refused:
        raise ValueError(f"{name} needs what is not supported: {', '.join(refused)}")
    known = READ | OFF | neutral.keys()
    unknown = [key for key in stated if key not in known and not WITHOUT_EFFECT.fullmatch(key)]
    if unknown:
        _logger.warning("config.json of %s: unknown keys are ignored: %s", name, ", ".join(unknown))


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    stored = (raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return "bfloat16" if stored == "float16" else stored


def _positions(raw: Mapping[str, Any], ropes: Iterable[Rope]) -> int:
    positions = raw["max_position_embeddings"]
    for scaling in {rope.scaling for rope in ropes} - {None}:
        if scaling.kind == "yarn":
            # Qwen's cards add yarn to a configuration that keeps the unstretched number.
            positions = max(positions, int(scaling.factor * scaling.original_positions))
    return positions


def _layer_kinds(raw: Mapping[str, Any], ropes: Mapping[str, Rope], name: str) -> LayerKinds:
    """Of each layer by layer_types, or by max_window_layers, how many of the first layers do not slide."""
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    types = raw.get("layer_types")
    if types is None:
        full = layers if window is None else min(raw.get("max_window_layers") or 0, layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    slides = "sliding_attention" in types
    others = {*types} - {*LAYER_TYPES}
    if others or (slides and window is None) or len(types) != max(layers, 0):
        raise ValueError(
            f"{name} has layer_types {types} with num_hidden_layers {layers} and a sliding window of "
            f"{window}; one of full_attention or sliding_attention is needed for each layer, and a window "
            "for the latter"
        )
    if slides and window <= 0:
        raise ValueError(f"{name} has sliding_window {window}; it must be positive")
    return tuple(LayerKind(ropes[kind], window if kind == "sliding_attention" else None) for kind in types)


def _ropes(raw: Mapping[str, Any], name: str, partial: bool) -> dict[str, Rope]:
    """The rope of each type of layer; `partial`: the family can rotate a part of each head.

    transformers 4 calls their keys rope_scaling, transformers 5 rope_parameters.
    """
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if old and new and old != new:
        raise ValueError(
            f"config.json of {name} has rope_scaling {old} and rope_parameters {new}; delete one"
        )
    rope = old or new
    by_type = {kind: rope for kind in LAYER_TYPES}
    if rope.keys() & {*LAYER_TYPES}:
        if others := {key for key, value in rope.items() if value is not None} - {*LAYER_TYPES}:
            raise ValueError(
                f"{name} has rotary parameters of {', '.join(sorted(others))} beside those of layer types; "
                f"supported are {', '.join(LAYER_TYPES)}"
            )
        by_type = {kind: rope.get(kind) or {} for kind in LAYER_TYPES}
    ropes = {}
    for kind, parameters in by_type.items():
        _check_rope(parameters, name)
        try:
            scaling = _rope_scaling(parameters, raw)
        except KeyError as error:
            raise ValueError(f"config.json of {name} has rope scaling without {error}") from error
        share = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
        if share != 1.0 and not partial:
            raise ValueError(f"{name} has partial_rotary_factor {share}, only 1.0 is supported")
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        channels = None if share == 1.0 else int(head_dim * share)
        theta = parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0
        ropes[kind] = Rope(theta, scaling, channels)
    return ropes


def _check_rope(rope: Mapping[str, Any], name: str) -> None:
    unknown = [
        f"{key} {value!r}" for key, value in rope.items() if key not in ROPE_KEYS and value is not None
    ]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"{name} has rope type {kind!r}; supported are {', '.join(ROPE_TYPES)}")
    if unknown:
        raise ValueError(f"{name} has rotary parameters that are not supported: {', '.join(unknown)}")
    if rope.get("type", kind) != kind:
        raise ValueError(f"{name} has rope_type {kind!r} and type {rope['type']!r}; delete one")


def _rope_scaling(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    max_positions = raw["max_position_embeddings"]
    # One that stands outside of the rotary keys comes first in transformers.
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or max_positions
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope["factor"],
            original_positions=original,
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
        )
    factor = rope.get("factor") or max_positions / original
    if kind == "longrope":
        attention = rope.get("attention_factor")
        if attention is None and factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return RopeScaling(
            "longrope",
            original_positions=original,
            attention_factor=attention or 1.0,
            factors=tuple(rope["long_factor"]),
            short_factors=tuple(rope["short_factor"]),
        )
    attention, mscale, all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and mscale and all_dim and factor > 1:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_positions=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=attention,
        truncate=rope.get("truncate", True),
    )
