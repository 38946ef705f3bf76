"""Models in Hugging Face's layout: a folder, or a hub id, with config.json, safetensors and a tokenizer."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import numpy as np
from safetensors import SafetensorError, safe_open

from retro_jax.models.config import ModelConfig
from retro_jax.models.families import huggingface_families
from retro_jax.models.families.family import Container
from retro_jax.models.formats.huggingface_config import config_from_json
from retro_jax.models.formats.huggingface_tokenizer import (
    FILES,
    OTHER_FORMATS,
    as_list,
    load_tokenizer,
    read_json,
)
from retro_jax.models.formats.packed_experts import unpacked
from retro_jax.models.formats.weights import Progress, load_params
from retro_jax.models.model import Model

HUB_PATTERNS = (
    "config.json",
    *FILES,
    *OTHER_FORMATS,
    "model.safetensors.index.json",
    "model*.safetensors",
)


FLOATING = ("F32", "BF16", "F16", "F64")
"""Types of stored weights, as safetensors names them."""

_logger = logging.getLogger(__name__)


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
    raw = read_json(folder / "config.json")
    if raw is None:
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model in Hugging Face's layout")
    config = config_from_json(raw, name or folder.resolve().name, dtype)
    family = huggingface_families()[raw["model_type"]]
    form = family.huggingface
    table = {path: weight.huggingface for path, weight in family.names.items()}
    tokenizer = load_tokenizer(folder, as_list(raw.get("eos_token_id")))
    with ExitStack() as open_files:
        tensors, problems, lost = _open_tensors(folder, open_files)
        if form.packed_experts:
            tensors, lost, faults = unpacked(tensors, lost)
            problems += faults
        shapes = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor, file in tensors.items()}
        for tensor in list(shapes):
            # Older checkpoints hold the rotary frequencies.
            if tensor.endswith("rotary_emb.inv_freq"):
                del shapes[tensor]
        if form.container and raw["model_type"] == form.container.name:
            table = _in_container(form.container, table, shapes, folder)
        problems += _not_floating(tensors, shapes)
        if not problems:
            config = _resolve_tied_head(config, table, tensors, shapes, folder)

        def read(tensor: str) -> np.ndarray:
            return tensors[tensor].get_tensor(tensor)

        params = load_params(
            config, table, shapes, read, str(folder), problems, lost, progress, form.norm_offset
        )
    return Model(config, params, tokenizer)


def _open_tensors(folder: Path, open_files: ExitStack) -> tuple[dict[str, Any], list[str], set[str]]:
    """Opens the weights: file by tensor name, what is wrong with the files, and the tensors lost by that."""
    # A whole file comes before shards, as in transformers: an index beside it is a leftover.
    whole = (folder / "model.safetensors").exists()
    index = None if whole else read_json(folder / "model.safetensors.index.json")
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


def _in_container(
    container: Container, table: dict[str, str], shapes: dict[str, tuple[int, ...]], folder: Path
) -> dict[str, str]:
    """Names of the language model's weights in a container, whose other weights are taken out of `shapes`."""
    others = [name for name in shapes if name.startswith(container.others)]
    for name in others:
        del shapes[name]
    if others:
        _logger.warning(
            "%s: %d weights of other parts than the language model are left out: %s and so on; it reads text "
            "only",
            folder,
            len(others),
            others[0],
        )
    layouts = [
        {path: new + name.removeprefix(old) if name.startswith(old) else name for path, name in table.items()}
        for old, new in container.prefixes
    ]
    return max(
        layouts, key=lambda layout: sum(name.replace("{i}", "0") in shapes for name in layout.values())
    )


def _not_floating(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Weights that are no numbers by themselves: integers or 8-bit floats, which need scales."""
    kinds = {name: tensors[name].get_slice(name).get_dtype() for name in shapes}
    return [
        f"unsupported quantisation: {name} is {kind}, supported are {', '.join(FLOATING)}"
        for name, kind in kinds.items()
        if kind not in FLOATING
    ]


def _resolve_tied_head(
    config: ModelConfig,
    table: Mapping[str, str],
    tensors: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
) -> ModelConfig:
    """Of a tied head that is stored, too: drops an equal copy, and follows the weights if they differ.

    If only the head is stored, it is the embedding. transformers does the same.
    """
    embed, head = table["embed"], table["head"]
    if not config.tie_embeddings or head not in shapes:
        return config
    if embed not in shapes:
        tensors[embed] = _Renamed(tensors[head], head)
        shapes[embed] = shapes.pop(head)
        return config
    stored = [tensors[name].get_tensor(name) for name in (embed, head)]
    if np.array_equal(*stored):
        del shapes[head]
        return config
    _logger.warning(
        "%s: config.json says tie_word_embeddings, but %s differs from %s; the weights are followed",
        folder,
        head,
        embed,
    )
    return dataclasses.replace(config, tie_embeddings=False)


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """A tensor of an open file under another name."""

    file: Any
    name: str

    def get_tensor(self, _: str) -> np.ndarray:
        return self.file.get_tensor(self.name)
