"""Our weights as a Hugging Face folder, for running transformers on exactly the same numbers."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from retro_jax.models import Model, ModelConfig
from retro_jax.models.families.family import NAMES
from retro_jax.models.formats.weights import checkpoint_name, separate_weights


def export(model: Model, folder: Path) -> None:
    """Writes config.json and model.safetensors into a folder that exists.

    Raises:
        ValueError: the model scales its rotary embedding, its layers differ, or it has parts that those of
            Llama, Qwen2 and Qwen3 lack, which is not exported.
    """
    (folder / "config.json").write_text(json.dumps(_config(model.config)))
    table = {path: name.huggingface for path, name in NAMES.items()}
    tensors = {
        # Matrices are (in, out) here and (out, in) there, except the embedding.
        checkpoint_name(table, path): np.ascontiguousarray(weight if path == "embed" else weight.T)
        for path, weight in separate_weights(model.params, model.config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PLAIN = (
    "norms", "float32_norms", "joint_qk_norm", "activation", "embedding_multiplier", "residual_multiplier",
    "logits_divisor", "logits_soft_cap",
)  # fmt: skip
"""Fields that the models which are exported leave as they are by default."""


def _config(config: ModelConfig) -> dict:
    other = [
        f"{field} {value!r}"
        for field in PLAIN
        if (value := getattr(config, field)) != getattr(ModelConfig, field)
    ]
    if other:
        raise ValueError(
            f"{config.name} has {', '.join(other)}, which the export for --reference does not cover; use "
            "another model, or leave --reference out"
        )
    if config.rope_scaling is not None:
        raise ValueError(
            f"{config.name} scales its rotary embedding ({config.rope_scaling.kind}), which the export for "
            "--reference does not cover; use a model without it, or leave --reference out"
        )
    if config.layer_kinds is not None or config.experts is not None or config.output_bias:
        raise ValueError(
            f"the layers of {config.name} are of kinds that the export for --reference does not cover; use "
            "another model, or leave --reference out"
        )
    if config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias:
        family, name = "qwen2", "Qwen2ForCausalLM"
    else:
        family, name = "llama", "LlamaForCausalLM"
    return {
        "model_type": family,
        "architectures": [name],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
    }
