"""Makes the tiny models under golden/ and Hugging Face transformers' float32 logits for them.

Run from the repository root as `python -m tests.models.make_golden`, with names for some of them only. These
were made with torch 2.13, transformers 5.23 (those of `BOTH_FORMATS` 5.24), gguf 0.19, sentencepiece 0.2.3.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.models.golden_tokenizers import make_tokenizer, write_byte_level, write_sentencepiece

GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}


def families() -> dict:
    """Configuration by folder; names say what each is there for."""
    return {
        "llama2": LlamaConfig(**SIZES | UNTIED | {"num_key_value_heads": 4}),
        "llama3.1-sharded": LlamaConfig(
            **SIZES | UNTIED | {"vocab_size": 384, "rope_parameters": LLAMA3_ROPE, "head_dim": 16}
        ),
        "llama-tied-linear": LlamaConfig(
            **SIZES | TIED, rope_parameters={"rope_type": "linear", "rope_theta": 100_000.0, "factor": 2.0}
        ),
        "mistral": MistralConfig(**SIZES | UNTIED, head_dim=8, sliding_window=None),
        "qwen2": Qwen2Config(**SIZES | TIED),
        "qwen2.5-yarn": Qwen2Config(**SIZES | UNTIED, rope_parameters=YARN_ROPE),
        "qwen3": Qwen3Config(**SIZES | UNTIED, head_dim=16),
    }


SMALL = SIZES | {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}
# The root of 1 + ln(512 / 16) / ln(16) is 1.5, which both formats hold exactly.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 12.0],
    "short_factor": [1.0, 1.0, 1.25, 1.25, 1.5, 2.0],
}
BOTH_FORMATS = {
    "gemma3": Gemma3TextConfig(
        **SMALL | TIED | {"hidden_size": 8, "intermediate_size": 16},
        head_dim=256, sliding_window=20, rope_parameters=GEMMA3_ROPE,
        layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=3.0,
    ),
    "olmo2": Olmo2Config(**SMALL | UNTIED | {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "phi3": Phi3Config(
        **SMALL | TIED | {"hidden_size": 32, "max_position_embeddings": 512},
        original_max_position_embeddings=16, rope_parameters=LONGROPE, partial_rotary_factor=0.75,
    ),
    "smollm3": SmolLM3Config(**SMALL | TIED | {"num_hidden_layers": 4}),
    "granite": GraniteConfig(
        **SMALL | TIED | {"num_hidden_layers": 1}, embedding_multiplier=3.0, residual_multiplier=0.22,
        attention_multiplier=0.5, logits_scaling=4.0,
    ),
}  # fmt: skip
"""Configuration by name, which is that of the architecture in GGUF; the same weights in both formats."""


def random_model(config, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model whose norms and biases are random, too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            else:
                weight.normal_(float(name.endswith("norm.weight")), 0.3)
            weight.copy_(weight.to(dtype).float())
    return model


def logits_of(model, vocab_size: int, length: int = 73) -> dict[str, np.ndarray]:
    """Of random tokens: a prompt of 9 and 64 decode steps, or as many as are asked for."""
    tokens = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return {"tokens": tokens.numpy().astype(np.int32), "logits": model(tokens).logits.numpy()}


def make_family(name: str, config) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    dtype = {"llama3.1-sharded": torch.bfloat16, "mistral": torch.float16}.get(name, torch.float32)
    dtype = torch.float16 if name in BOTH_FORMATS else dtype
    model = random_model(config, dtype=dtype)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if "sharded" in name else "1GB")
    if name == "llama-tied-linear":
        write_old_style(folder / "config.json")
    if name == "llama3.1-sharded":
        make_tokenizer(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    np.savez_compressed(folder / "golden.npz", **logits_of(reloaded.eval(), config.vocab_size))


def write_old_style(path: Path) -> None:
    """Rewrites the rotary keys as transformers 4 wrote them."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["torch_dtype"] = raw.pop("dtype")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    path.write_text(json.dumps(raw, indent=2))


def llama_cpp_rope_factors(rope: dict, head_dim: int) -> np.ndarray:
    """The divisors llama.cpp's converter stores for Llama 3.1's rotary scaling."""
    factors, original = [], rope["original_max_position_embeddings"]
    for channel in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (channel / head_dim)
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (original / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: rotary halves to interleaved pairs."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def begin_gguf(name: str, config, architecture: str) -> gguf.GGUFWriter:
    """The writer of golden/NAME.gguf, with the sizes that every architecture has."""
    writer, rope = gguf.GGUFWriter(GOLDEN / f"{name}.gguf", architecture), config.rope_parameters
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    return writer


def make_gguf(name: str, config, architecture: str, write_tokenizer) -> None:
    """Writes a GGUF of a random model, and the logits of the same model with the dequantised weights."""
    model = random_model(config)
    writer = begin_gguf(name, config, architecture)
    write_tokenizer(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    kinds = [
        gguf.GGMLQuantizationType[kind] for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16")
    ]
    with torch.no_grad():
        for count, (weight_name, weight) in enumerate(model.named_parameters()):
            if config.tie_word_embeddings and weight_name == "lm_head.weight":
                continue
            kind = kinds[count % len(kinds)] if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            values = weight.numpy()
            permuted = architecture == "llama" and ("q_proj" in weight_name or "k_proj" in weight_name)
            heads = config.num_attention_heads if "q_proj" in weight_name else config.num_key_value_heads
            stored = permute(values, heads) if permuted else values
            data = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
            writer.add_tensor(names.get_name(weight_name, (".weight", ".bias")), data, raw_dtype=kind)
            rounded = gguf.quants.dequantize(data, kind).reshape(stored.shape)
            if permuted:
                rounded = (
                    rounded.reshape(heads, -1, 2, rounded.shape[1]).swapaxes(1, 2).reshape(rounded.shape)
                )
            weight.copy_(torch.from_numpy(np.ascontiguousarray(rounded)))
    if config.rope_parameters["rope_type"] == "llama3":
        head_dim = config.hidden_size // config.num_attention_heads
        writer.add_tensor("rope_freqs.weight", llama_cpp_rope_factors(config.rope_parameters, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(GOLDEN / f"{name}.npz", **logits_of(model, config.vocab_size, 48))


def make_both_formats(architecture: str, config) -> None:
    """A folder and a GGUF file of one random model, as llama.cpp's converter writes it, in float16."""
    make_family(architecture, config)
    folder = GOLDEN / architecture
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer = begin_gguf(architecture, config, architecture)
    if architecture == "gemma3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif architecture == "phi3":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        writer.add_sliding_window(0)
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    elif architecture in ("smollm3", "granite"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), layers)
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        if architecture in ("smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            values = permute(values, heads if "q_proj" in name else config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        kind = np.float16 if values.ndim == 2 else np.float32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(values, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    llama = LlamaConfig(**SIZES | UNTIED | {"vocab_size": 384, "rope_parameters": LLAMA3_ROPE})
    qwen2 = Qwen2Config(**SIZES | TIED | {"vocab_size": 384})
    makers = {name: lambda n=name, c=config: make_family(n, c) for name, config in families().items()}
    makers |= {
        name: lambda n=name, c=config: make_both_formats(n, c) for name, config in BOTH_FORMATS.items()
    }
    makers["gguf-llama"] = lambda: make_gguf("gguf-llama", llama, "llama", write_sentencepiece)
    makers["gguf-qwen2"] = lambda: make_gguf("gguf-qwen2", qwen2, "qwen2", write_byte_level)
    for name in sys.argv[1:] or makers:
        makers[name]()


if __name__ == "__main__":
    main()
