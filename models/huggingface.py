"""Models in Hugging Face's layout: a folder, or a hub id, with config.json, safetensors and a tokenizer.

Families `llama` (Llama 2/3/3.1, SmolLM2, DeepSeek-R1-Distill-Llama), `mistral`, `qwen2` (Qwen2, Qwen2.5,
DeepSeek-R1-Distill-Qwen) and `qwen3`. A new family of the same kind is one entry in `FAMILIES`, what it reads
differently in `config_from_json`, and new weight names in `TABLE`.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from models.config import ModelConfig, RopeScaling
from models.model import Model
from models.tokenizer import Tokenizer
from models.weights import Progress, load_params

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

TABLE = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.wq": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.wk": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.wv": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.bq": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.bk": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.bv": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.wo": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.w_gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.w_up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.w_down": "model.layers.{i}.mlp.down_proj.weight",
}
HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model*.safetensors",
)


def download(repository: str, revision: str | None = None) -> Path:
    """Folder of a hub repository in Hugging Face's own cache, with only the files that are read here.

    Raises:
        OSError: if the hub cannot be reached and the cache does not have it, or the hub refuses.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS)
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise OSError(
            f"could not fetch {repository!r} from the Hugging Face hub: {error}\n"
            f"Check the name (there is no folder {repository} here) and the network; run `hf auth login` for "
            "a gated model; or fetch it elsewhere with `hf download` and give the folder"
        ) from error


def load_folder(
    folder: Path, dtype: str | None = None, progress: Progress | None = None, name: str | None = None
) -> Model:
    """Reads a model from a folder in Hugging Face's layout.

    Args:
        folder: holds config.json, model.safetensors or its shards with their index, and, for text,
            tokenizer.json.
        dtype: of the weights; None: as config.json says, bfloat16 for float16.
        progress: called with ("load", tensors done, tensors).
        name: of the model; None: the folder's.

    Raises:
        FileNotFoundError: if config.json or the weights are missing.
        ValueError: if a file is broken, the architecture is not supported, or the weights do not match the
            configuration (all problems named at once).
    """
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model in Hugging Face's layout")
    config = config_from_json(raw, name or folder.resolve().name, dtype)
    tokenizer = load_tokenizer(folder, _as_list(raw.get("eos_token_id")))
    with ExitStack() as open_files:
        tensors, problems, lost = _open_tensors(folder, open_files)
        shapes = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor, file in tensors.items()}
        for tensor in list(shapes):
            # Older checkpoints hold the rotary frequencies, and some a second copy of a tied head.
            if tensor.endswith("rotary_emb.inv_freq") or (tensor == TABLE["head"] and config.tie_embeddings):
                del shapes[tensor]

        def read(tensor: str) -> np.ndarray:
            return tensors[tensor].get_tensor(tensor)

        params = load_params(config, TABLE, shapes, read, str(folder), problems, lost, progress)
    return Model(config, params, tokenizer)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Contents of a JSON file, None if there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); fetch it again") from error


def _open_tensors(folder: Path, open_files: ExitStack) -> tuple[dict[str, Any], list[str], set[str]]:
    """Opens the weights: file by tensor name, what is wrong with the files, and the tensors lost by that."""
    index = _read_json(folder / "model.safetensors.index.json")
    if index is not None and "weight_map" not in index:
        raise ValueError(f"{folder}/model.safetensors.index.json has no weight_map; fetch it again")
    shard_of = {} if index is None else index["weight_map"]
    shards = sorted(set(shard_of.values())) or ["model.safetensors"]
    if index is None and not (folder / shards[0]).exists():
        raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    tensors, problems, lost = {}, [], set()
    for shard in shards:
        path = folder / shard
        try:
            file = open_files.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            what = f"{path} is truncated or broken ({error})" if path.exists() else f"missing shard: {path}"
            problems.append(f"{what}; fetch it again")
            lost |= {tensor for tensor, its_shard in shard_of.items() if its_shard == shard}
        else:
            tensors |= dict.fromkeys(file.keys(), file)
    if problems and index is None:
        raise ValueError(problems[0])
    return tensors, problems, lost


def config_from_json(raw: Mapping[str, Any], name: str, dtype: str | None = None) -> ModelConfig:
    """Configuration from the contents of config.json, as written by transformers 4 or 5.

    Args:
        raw: contents of config.json.
        name: of the model.
        dtype: None: as the file says, bfloat16 for float16.

    Raises:
        ValueError: if the family or a part of the model is not supported, or a needed key is missing.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{name} is of the family {family!r}; supported are {', '.join(FAMILIES)}")
    unsupported = [
        f"{key} {raw[key]!r}"
        for key, supported in (
            ("hidden_act", ("silu", None)),
            ("quantization_config", (None,)),
            ("mlp_bias", (False, None)),
            # Qwen2 always has biases on q, k and v; where this key counts, it adds one on the output, too.
            ("attention_bias", (False, None)),
            ("partial_rotary_factor", (1.0, None)),
        )
        if raw.get(key) not in supported
    ]
    if unsupported:
        raise ValueError(f"{name} needs what is not supported: {', '.join(unsupported)}")
    needed = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    needed += ("max_position_embeddings", "rms_norm_eps")
    missing = [key for key in needed if key not in raw]
    if missing:
        raise ValueError(f"config.json of {name} has no {', '.join(missing)}")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    try:
        scaling = _rope_scaling(rope, raw["max_position_embeddings"], name)
    except KeyError as error:
        raise ValueError(f"config.json of {name} has rope scaling without {error}") from error
    return ModelConfig(
        name=name,
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        width=raw["hidden_size"],
        hidden_width=raw["intermediate_size"],
        max_positions=_max_positions(raw, scaling),
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0,
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=raw.get("tie_word_embeddings", False),
        dtype=dtype or _stored_dtype(raw),
    )


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return "bfloat16" if stored == "float16" else stored


def _max_positions(raw: Mapping[str, Any], scaling: RopeScaling | None) -> int:
    """Positions up to which the model computes what is computed here; see ModelConfig on sliding windows."""
    positions = raw["max_position_embeddings"]
    if scaling is not None and scaling.kind == "yarn":
        # Qwen's cards add yarn to a configuration that keeps the unstretched number.
        positions = max(positions, int(scaling.factor * scaling.original_positions))
    window = raw.get("sliding_window")
    if window is not None and raw.get("use_sliding_window", raw["model_type"] == "mistral"):
        positions = min(positions, window)
    return positions


def _rope_scaling(rope: Mapping[str, Any], max_positions: int, name: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or max_positions
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{name} has partial_rotary_factor {rope['partial_rotary_factor']}, only 1.0 is supported"
        )
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
    if kind == "yarn":
        if rope.get("mscale") or rope.get("mscale_all_dim"):
            raise ValueError(f"{name} has yarn rope scaling with mscale; use attention_factor")
        return RopeScaling(
            "yarn",
            factor=rope.get("factor") or max_positions / original,
            original_positions=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            attention_factor=rope.get("attention_factor"),
            truncate=rope.get("truncate", True),
        )
    raise ValueError(f"{name} has rope type {kind!r}; supported are default, linear, llama3, yarn")


def load_tokenizer(folder: Path, stop_ids: Iterable[int] = ()) -> Tokenizer | None:
    """Tokenizer of a folder in Hugging Face's layout, None if it has no tokenizer.json.

    Args:
        folder: may hold tokenizer_config.json, chat_template.jinja and generation_config.json as well.
        stop_ids: ends of text that are known from elsewhere.

    Raises:
        ValueError: if one of the files is broken.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} is broken ({error}); fetch it again") from error
    settings = _read_json(folder / "tokenizer_config.json") or {}
    generation = _read_json(folder / "generation_config.json") or {}
    bos_token = _token_text(settings.get("bos_token"))
    # What the backend's post-processor puts before an empty text tells the habit where no setting does.
    begins = backend.encode("").tokens[:1] == [bos_token]
    return Tokenizer(
        backend,
        bos_token=bos_token,
        eos_token=_token_text(settings.get("eos_token")),
        stop_ids=[*stop_ids, *_as_list(generation.get("eos_token_id"))],
        add_bos=begins if settings.get("add_bos_token") is None else settings["add_bos_token"],
        chat_template=_chat_template(folder, settings),
    )


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    """Tokens are written as text or, by older releases, as a record with the text as its content."""
    return token["content"] if isinstance(token, Mapping) else token


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
