"""Models in GGUF files: metadata to configuration, quantised tensors to weights, tokenizer with them."""

import re
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np

from retro_jax.models.families import gguf_families
from retro_jax.models.formats.gguf_config import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    config_from_metadata,
)
from retro_jax.models.formats.gguf_tokenizer import tokenizer_from_metadata
from retro_jax.models.formats.weights import Progress, load_params
from retro_jax.models.model import Model

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def load_gguf(path: Path, dtype: str | None = None, progress: Progress | None = None) -> Model:
    """Reads a model from a GGUF file.

    Args:
        path: the file; of a model that is split, any part, with the others beside it.
        dtype: of the weights; None: float32, whatever the file's quantisation.
        progress: called with ("load", tensors done, tensors).

    Raises:
        FileNotFoundError: if there is no such file, or a part of it is missing.
        ValueError: if the file is broken or truncated, its architecture, rotary scaling, tokenizer or
            quantisation is not supported, or its tensors do not match its metadata (all named at once).
    """
    metadata, tensors = _read_parts(path)
    # GGML lists the fastest axis first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    factors = {
        name: _dequantize(tensors[name])
        for name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
        if shapes.pop(name, None)
    }
    config = config_from_metadata(metadata, shapes, factors, str(path), dtype or "float32")
    tokenizer = tokenizer_from_metadata(metadata, str(path))
    unsupported = [
        f"unsupported quantisation: {name} is {tensor.tensor_type.name}"
        for name, tensor in tensors.items()
        if not _can_dequantize(tensor)
    ]
    family = gguf_families()[metadata["general.architecture"]]
    table = {path: weight.gguf for path, weight in family.names.items()}
    heads = {"wq": config.num_heads, "bq": config.num_heads}
    heads |= {"wk": config.num_kv_heads, "bk": config.num_kv_heads}
    interleaved = {
        table[f"layers.{{i}}.{parameter}"].format(i=layer): count
        for parameter, count in heads.items()
        for layer in range(config.num_layers)
        if family.gguf_interleaved
    }

    def read(name: str) -> np.ndarray:
        values = _dequantize(tensors[name])
        return _unpermute(values, interleaved[name]) if name in interleaved else values

    params = load_params(
        config,
        table,
        shapes,
        read,
        str(path),
        unsupported,
        progress=progress,
        norm_offset=family.gguf.norm_offset,
    )
    return Model(config, params, tokenizer)


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Metadata of the first part, which has all of it, and the tensors of all parts by name."""
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 1)
    if count > 1:
        name = PART.fullmatch(path.name)
        if name is None or int(name[3]) != count:
            raise ValueError(
                f"{path} is part {metadata.get('split.no', 0) + 1} of {count}; name the parts "
                f"NAME-00001-of-{count:05}.gguf and so on in one folder, or join them by gguf-split --merge"
            )
        paths = [path.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, count + 1)]
        missing = [part.name for part in paths if not part.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} is one of {count} parts; {', '.join(missing)} are missing beside it"
            )
        parts = [_read_file(part) for part in paths]
        for number, (part, (keys, _)) in enumerate(zip(paths, parts, strict=True)):
            if (keys.get("split.no"), keys.get("split.count")) != (number, count):
                raise ValueError(
                    f"{part} is not part {number + 1} of {count} by its metadata; fetch it again"
                )
        metadata = parts[0][0]
        tensors = {name: tensor for _, found in parts for name, tensor in found.items()}
    wanted = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != wanted:
        raise ValueError(f"{path} has {len(tensors)} tensors, its metadata says {wanted}; fetch it again")
    return metadata, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or not a GGUF file ({error}); fetch or convert it again"
        ) from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


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
