"""Makes the tiny mixtures of experts under golden/ and Hugging Face transformers' float32 logits for them.

Run from the repository root as `python -m tests.models.make_golden_experts`. These were made with torch 2.13,
transformers 5.24 and gguf 0.19.
"""

import re
import shutil

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.make_golden import GOLDEN, UNTIED, begin_gguf, logits_of, permute, random_model

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
OLMOE = SIZES | {"num_experts": 6, "num_experts_per_tok": 2, "num_attention_heads": 4}
GPT_OSS = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 11,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
}
MIXTRAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of (E, in, out), as gpt-oss's checkpoints hold them."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = (groups / 2 ** exponents[..., None])[..., None]
    codes = (scaled - torch.cat([positive, -positive])).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def write_folder(name: str, model) -> None:
    """The model in bfloat16; gpt-oss's experts in MXFP4, but for the folder that says plain."""
    folder, config = GOLDEN / name, model.config
    shutil.rmtree(folder, ignore_errors=True)
    if config.model_type != "gpt_oss" or "plain" in name:
        model.to(torch.bfloat16).save_pretrained(folder)
        return
    packed = {}
    for weight_name, weight in model.named_parameters():
        if weight.ndim == 3:
            blocks, scales = mxfp4(weight.detach())
            packed |= {f"{weight_name}_blocks": blocks, f"{weight_name}_scales": scales}
        else:
            packed[weight_name] = weight.detach().to(torch.bfloat16)
    config.dtype = "bfloat16"
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config.save_pretrained(folder)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})


def gguf_tensors(name: str, weight: np.ndarray, config) -> dict[str, np.ndarray]:
    """A weight of transformers as llama.cpp's converter writes it, by name."""
    if config.model_type == "gpt_oss" and "experts." in name:
        matrix, ending = weight.ndim == 3, "bias" if name.endswith("bias") else "weight"
        stored = weight.swapaxes(1, 2) if matrix else weight
        if "gate_up" not in name:
            return {f"ffn_down_exps.{ending}": stored}
        return {f"ffn_gate_exps.{ending}": stored[:, ::2], f"ffn_up_exps.{ending}": stored[:, 1::2]}
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
        "lm_head": "output", "router": "ffn_gate_inp", "sinks": "attn_sinks",
    }  # fmt: skip
    if config.model_type == "gpt_oss":
        names["post_attention_layernorm"] = "post_attention_norm"
    stem = f".{name.removesuffix('.weight').removesuffix('.bias')}"
    (found,) = (theirs for ours, theirs in names.items() if stem.endswith(f".{ours}"))
    return {f"{found}.{'bias' if name.endswith('.bias') else 'weight'}": weight}


def write_gguf(name: str, model, architecture: str) -> None:
    """The same numbers as llama.cpp's converter writes them: bfloat16, gpt-oss's experts in MXFP4."""
    config, kinds = model.config, gguf.GGMLQuantizationType
    writer = begin_gguf(name, config, architecture)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.to_dict().get("head_dim"):
        writer.add_key_length(config.head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    for weight_name, weight in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", weight_name)
        for tensor, values in gguf_tensors(weight_name, weight.detach().numpy(), config).items():
            kind = kinds.F32 if values.ndim == 1 or tensor.endswith("bias") else kinds.BF16
            if config.model_type == "gpt_oss" and values.ndim == 3:
                kind = kinds.MXFP4
            data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(f"blk.{layer[1]}.{tensor}" if layer else tensor, data, raw_dtype=kind)
            np.testing.assert_array_equal(gguf.quants.dequantize(data, kind).reshape(values.shape), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(name: str, config, architecture: str | None = None) -> None:
    """A model in both formats, or as a folder only, and transformers' logits for it."""
    model = random_model(config, dtype=torch.bfloat16)
    if config.model_type == "gpt_oss" and architecture:
        for weight in model.parameters():
            if weight.ndim == 3:
                weight.data = convert_moe_packed_tensors(*mxfp4(weight.data), dtype=torch.float32)
    logits = logits_of(model, config.vocab_size)
    if architecture:
        write_gguf(name, model, architecture)
    write_folder(name, model)
    np.savez_compressed(GOLDEN / name / "golden.npz", **logits)


def main() -> None:
    make("qwen3moe", Qwen3MoeConfig(**QWEN3_MOE), "qwen3moe")
    one_dense = {"mlp_only_layers": [0], "norm_topk_prob": False}
    make("qwen3moe-one-dense", Qwen3MoeConfig(**QWEN3_MOE | one_dense))
    make("mixtral", MixtralConfig(**MIXTRAL), "llama")
    make("olmoe", OlmoeConfig(**OLMOE), "olmoe")
    make("gpt-oss", GptOssConfig(**GPT_OSS), "gpt-oss")
    make("gpt-oss-plain", GptOssConfig(**GPT_OSS | {"swiglu_limit": 0.75}))


if __name__ == "__main__":
    main()
