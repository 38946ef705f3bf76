"""Learned scores in a folder: their weights, and which model they are of."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from retro_jax.models import LearnedScore, Model
from retro_jax.models.config import ModelConfig
from retro_jax.models.fingerprint import fingerprint, named_arrays
from retro_jax.models.learned_score import SCORE_ARRAYS
from retro_jax.models.transformer import Params
from retro_jax.sharding import mesh_of, shard_params

ABOUT, WEIGHTS = "score.json", "score.safetensors"
"""The files of a folder. `ABOUT` is written last: where it is, the other is whole."""
FORMAT = 1


def model_identity(params: Params, config: ModelConfig) -> dict:
    """What a score must have been trained on, as JSON values.

    The digest is of all layers' query, key and value matrices, each number rounded to bfloat16, so that it is
    the same in whatever dtype a model was loaded.
    """
    found = hashlib.sha256()
    for layer in params.layers:
        found.update(np.asarray(layer.wqkv).astype(jnp.bfloat16).tobytes())
    return {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "digest": found.hexdigest()[:16],
    }


def score_tensors(scores: tuple[LearnedScore, ...]) -> dict[str, np.ndarray]:
    """The arrays of all layers, by names for a safetensors file."""
    return {
        f"layers.{index}.{name}": np.asarray(getattr(score, name), np.float32)
        for index, score in enumerate(scores)
        for name in SCORE_ARRAYS
    }


def score_about(model: Model, identity: Mapping, scores: tuple[LearnedScore, ...], weights: bytes) -> dict:
    """What `ABOUT` holds.

    Args:
      model: that the scores were trained on.
      identity: its `model_identity`.
      scores: of each layer.
      weights: the contents of `WEIGHTS`.
    """
    return {
        "format": FORMAT,
        "name": model.config.name,
        "model": dict(identity),
        "page_size": scores[0].page_size,
        "channels": scores[0].channels,
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def read_about(folder: Path) -> dict:
    """What a folder's score is.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no finished score, or a damaged one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name one that `retro-jax learn` has written")
    file = folder / ABOUT
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {ABOUT}, so it holds no finished score; where training was stopped, the same "
            "`retro-jax learn` command goes on"
        )
    try:
        about = json.loads(file.read_bytes())
        known = {name: about[name] for name in ("model", "name", "page_size", "channels", "weights")}
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or train again") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{file} has format {about.get('format')!r}, this version reads {FORMAT}")
    return about | known


def score_digest(params: Params) -> str | None:
    """What tells one learned score from another; None for weights that have none."""
    scores = tuple(layer.page_score for layer in params.layers)
    if None in scores:
        return None
    return fingerprint(named_arrays(scores))


def load_score(model: Model, folder: str | Path) -> Model:
    """The model with the learned page score of a folder, for `DecodeConfig(score="learned")`.

    The configuration's `page_size` and `score_channels` must be those that it was trained with, which
    `read_about` tells.

    Args:
      model: from `load_model`, the one that the score was trained on; in any dtype, and on any device or mesh
        of this process, on which the score is placed too.
      folder: written by `retro-jax learn`.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no finished score, a damaged one, or one of another model; or the model's weights
        lie on devices of several processes.
    """
    folder = Path(folder)
    about = read_about(folder)
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model.params)[:1]):
        raise ValueError(
            "the model lies on devices of several processes; let one of them write it with its score by "
            "save_model, and load that folder"
        )
    own = model_identity(model.params, model.config)
    if different := [name for name in own if about["model"].get(name) != own[name]]:
        told = "; ".join(f"{name} {about['model'].get(name)!r}, not {own[name]!r}" for name in different)
        raise ValueError(
            f"{folder} is a score of another model, {about['name']!r} ({told}); train one for "
            f"{model.config.name} by `retro-jax learn`"
        )
    tensors, mesh = _read_tensors(folder / WEIGHTS, about["weights"]), mesh_of(model.params)
    try:
        with jax.default_device(mesh.devices.flat[0]):  # where all weights lie, unless on several
            layers = tuple(
                layer.replace(
                    page_score=LearnedScore(
                        **{name: jnp.asarray(tensors[f"layers.{index}.{name}"]) for name in SCORE_ARRAYS},
                        page_size=about["page_size"],
                    )
                )
                for index, layer in enumerate(model.params.layers)
            )
    except KeyError as error:
        raise ValueError(f"{folder / WEIGHTS} has no {error}; restore it, or train again") from None
    params = model.params.replace(layers=layers)
    if mesh.size > 1:
        params = shard_params(params, model.config, mesh)
    return dataclasses.replace(model, params=params)


def _read_tensors(file: Path, digest: str) -> dict[str, np.ndarray]:
    try:
        contents = file.read_bytes()
        if hashlib.sha256(contents).hexdigest() != digest:
            raise ValueError("it is not the file that was written")
        return safetensors.numpy.load(contents)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or train again") from None
