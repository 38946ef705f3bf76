"""Models in GGUF files: metadata to configuration, quantised tensors to weights, tokenizer with them.

Architectures `llama` (Llama, SmolLM2, Mistral, DeepSeek-R1-Distill-Llama), `qwen2` and `qwen3`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np

from models.config import ModelConfig, RopeScaling
from models.gguf_tokenizer import tokenizer_from_metadata
from models.model import Model
from models.weights import Progress, load_params

ARCHITECTURES = ("llama", "qwen2", "qwen3")

TABLE = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers.{i}.attn_norm": "blk.{i}.attn_norm.weight",
    "layers.{i}.wq": "blk.{i}.attn_q.weight",
    "layers.{i}.wk": "blk.{i}.attn_k.weight",
    "layers.{i}.wv": "blk.{i}.attn_v.weight",
    "layers.{i}.bq": "blk.{i}.attn_q.bias",
    "layers.{i}.bk": "blk.{i}.attn_k.bias",
    "layers.{i}.bv": "blk.{i}.attn_v.bias",
    "layers.{i}.q_norm": "blk.{i}.attn_q_norm.weight",
    "layers.{i}.k_norm": "blk.{i}.attn_k_norm.weight",
    "layers.{i}.wo": "blk.{i}.attn_output.weight",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm.weight",
    "layers.{i}.w_gate": "blk.{i}.ffn_gate.weight",
    "layers.{i}.w_up": "blk.{i}.ffn_up.weight",
    "layers.{i}.w_down": "blk.{i}.ffn_down.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: Path, dtype: str | None = None, progress: Progress | None = None) -> Model:
    """Reads a model from a GGUF file.

    Args:
        path: the file.
        dtype: of the weights; None: float32, whatever the file's quantisation.
        progress: called with ("load", tensors done, tensors).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken or truncated, its architecture, rotary scaling, tokenizer or
            quantisation is not supported, or its tensors do not match its metadata (all named at once).
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or not a GGUF file ({error}); fetch or convert it again"
        ) from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # GGML lists the fastest axis first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    factors = shapes.pop(ROPE_FACTORS, None) and _dequantize(tensors[ROPE_FACTORS])
    config = config_from_metadata(metadata, shapes, factors, str(path), dtype or "float32")
    tokenizer = tokenizer_from_metadata(metadata, str(path))
    unsupported = [
        f"unsupported quantisation: {name} is {tensor.tensor_type.name}"
        for name, tensor in tensors.items()
        if not _can_dequantize(tensor)
    ]
    permuted = metadata["general.architecture"] == "llama"

    def read(name: str) -> np.ndarray:
        values = _dequantize(tensors[name])
        head = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name) if permuted else None
        if head is None:
            return values
        return _unpermute(values, config.num_heads if head[1] == "q" else config.num_kv_heads)

    params = load_params(config, TABLE, shapes, read, str(path), problems=unsupported, progress=progress)
    return Model(config, params, tokenizer)


def _dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _can_dequantize(tensor: gguf.ReaderTensor) -> bool:
    try:
        gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From interleaved rotary pairs, as llama.cpp stores q and k of Llama-type models, to split halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def config_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
    source: str,
    dtype: str,
) -> ModelConfig:
    """Configuration of the model in a GGUF file.

    Args:
        metadata: keys and values of the file.
        shapes: of its tensors, slowest axis first; they tell which optional parts there are.
        rope_factors: (D/2,) divisors of the rotary frequencies, if the file has them.
        source: the file, for messages.
        dtype: of the configuration.

    Raises:
        ValueError: if the architecture or a part of it is not supported, or a needed key is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source} has the architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(f"{source} is a mixture of experts, which is not supported; use a dense model")

    def value(key: str, default=None):
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{source} has no metadata key {architecture}.{key}")
        return found

    if "token_embd.weight" not in shapes:
        raise ValueError(f"{source} has no tensor token_embd.weight")
    width, num_heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise ValueError(
                f"{source} has {architecture}.{key} {value(key)}, only {head_dim} (D) is supported"
            )
    max_positions = value("context_length")
    return ModelConfig(
        name=metadata.get("general.name", Path(source).stem),
        vocab_size=shapes["token_embd.weight"][0],
        num_layers=value("block_count"),
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        width=width,
        hidden_width=value("feed_forward_length"),
        max_positions=min(max_positions, value("attention.sliding_window", max_positions) or max_positions),
        rope_theta=value("rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(value, max_positions, rope_factors, source),
        norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        tie_embeddings="output.weight" not in shapes,
        dtype=dtype,
    )


def _shortest(number: float) -> float:
    """The decimal number that a float32 of the file was written from: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(number)))


def _rope_scaling(value, max_positions: int, factors: np.ndarray | None, source: str) -> RopeScaling | None:
    kind = value("rope.scaling.type", "none")
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise ValueError(f"{source} has both {ROPE_FACTORS} and rope scaling {kind!r}; one is supported")
        return RopeScaling("factors", factors=tuple(factors.tolist()))
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{source} has rope scaling {kind!r}; none, linear, yarn are supported")
    factor = value("rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    return RopeScaling(
        "yarn", factor=factor, original_positions=value("rope.scaling.original_context_length", max_positions)
    )
