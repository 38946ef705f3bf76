"""Makes the tiny mixtures of experts under golden/ and Hugging Face transformers' float32 logits for them.

Run from the repository root as `python -m tests.models.make_golden_experts`. These were made with torch 2.13,
transformers 5.24 and gguf 0.19.
"""

import re
import shutil

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from tests.models.make_golden import GOLDEN, UNTIED, logits_of, permute, random_model

SIZES = UNTIED | {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
QWEN3_MOE = SIZES | {
    "head_dim": 8,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}
MIXTRAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}


def families() -> dict:
    """Configuration by folder; names say what each is there for."""
    return {
        "qwen3-moe-one-dense": Qwen3MoeConfig(
            **QWEN3_MOE | {"mlp_only_layers": [0], "norm_topk_prob": False}
        ),
        "mixtral": MixtralConfig(**MIXTRAL),
    }


def make_family(name: str, config) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    random_model(config).save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    np.savez_compressed(folder / "golden.npz", **logits_of(reloaded.eval(), config.vocab_size))


def gguf_tensors(name: str, weight: np.ndarray, config) -> dict[str, np.ndarray]:
    """A weight of transformers as llama.cpp's converter writes it, by name."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(weight, 2, axis=1)
        return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if config.model_type == "mixtral" and part in name:
            return {f"attn_{part[0]}.weight": permute(weight, count)}
    names = {
        "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
        "experts.down_proj": "ffn_down_exps", "embed_tokens": "token_embd", "norm": "output_norm",
        "lm_head": "output",
    }  # fmt: skip
    stem = f".{name.removesuffix('.weight')}"
    (found,) = (theirs for ours, theirs in names.items() if stem.endswith(f".{ours}"))
    return {f"{found}.weight": weight}


def make_gguf(name: str, config, architecture: str) -> None:
    """Writes a GGUF of a random model in float16, and the logits of the same model."""
    path = GOLDEN / f"{name}.gguf"
    model = random_model(config, dtype=torch.float16)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if "head_dim" in config.to_dict() and config.head_dim:
        writer.add_key_length(config.head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for weight_name, weight in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", weight_name)
        for tensor, values in gguf_tensors(weight_name, weight.detach().numpy(), config).items():
            values = values if values.ndim == 1 else values.astype(np.float16)
            writer.add_tensor(f"blk.{layer[1]}.{tensor}" if layer else tensor, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(GOLDEN / f"{name}.npz", **logits_of(model, config.vocab_size))


def main() -> None:
    for name, config in families().items():
        make_family(name, config)
    make_gguf("gguf-qwen3moe", Qwen3MoeConfig(**QWEN3_MOE), "qwen3moe")
    make_gguf("gguf-mixtral", MixtralConfig(**MIXTRAL), "llama")


if __name__ == "__main__":
    main()
