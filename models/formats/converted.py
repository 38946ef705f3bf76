"""Models as `save_model` leaves them: weights as a decode step wants them, sizes and tokenizer in one folder.

Matrices lie joined and keys are balanced, so that reading is all there is to do. Joined columns lie in
`ModelConfig.parts` parts, which depend on the model alone: any mesh that divides the model has whole parts on
each device, whatever mesh the weights lay on before.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import tokenizers
from jax.sharding import SingleDeviceSharding

from retro_jax.models.config import ModelConfig
from retro_jax.models.config_json import from_json, to_json
from retro_jax.models.fingerprint import named_arrays
from retro_jax.models.formats.checkpoint import read_about, read_arrays, read_object, write_checkpoint
from retro_jax.models.learned_score import SCORE_ARRAYS, LearnedScore
from retro_jax.models.model import Model
from retro_jax.models.tokenizer import Tokenizer
from retro_jax.models.transformer import Params, random_params

KIND = "model"

Shardings = Callable[[ModelConfig, Params], Params]
"""Where the weights of a model go: their shardings, of the weights as shapes."""


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model into a new folder, which `load_model` takes wherever it takes a model.

    The folder needs nothing else: it holds sizes, weights, tokenizer and chat template. Processes that share
    the weights all call it.

    Args:
        model: from `load_model`, whose keys are balanced.
        folder: must not exist.

    Raises:
        OSError: the folder exists or could not be written; nothing of it is kept then.
        TypeError: the tokenizer is of a kind that cannot be written.
    """
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, Tokenizer | None):
        raise TypeError(
            f"a tokenizer of type {type(tokenizer).__name__} cannot be written; use one of "
            "retro_jax.models.Tokenizer"
        )
    about = {
        "config": to_json(model.config),
        "parts": model.config.parts,
        "tokenizer": None,
        "score_page_sizes": [
            None if layer.page_score is None else layer.page_score.page_size for layer in model.params.layers
        ],
    }
    objects = {}
    if tokenizer is not None:
        about["tokenizer"] = {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "stop_ids": list(tokenizer.stop_ids),
            "add_bos": tokenizer.add_bos,
            "chat_template": tokenizer.chat_template,
            "template_tokens": tokenizer.template_tokens,
        }
        objects["tokenizer"] = json.loads(tokenizer.backend.to_str())
    write_checkpoint(Path(folder), KIND, about, named_arrays(model.params), **objects)


def converted_config(folder: Path, dtype: str | None = None) -> ModelConfig:
    """Sizes of a model that `save_model` wrote.

    Raises:
        ValueError: see `load_converted`.
    """
    return _config(folder, read_about(folder, KIND), dtype)


def converted_score(folder: Path) -> tuple[int, int] | None:
    """Page size and channels of the learned score that a model was written with; None: it has none.

    Raises:
        ValueError: see `load_converted`.
    """
    about = read_about(folder, KIND)
    sizes = about.get("score_page_sizes", [])
    index = next((index for index, size in enumerate(sizes) if size is not None), None)
    if index is None:
        return None
    _, shape = about["arrays"][f"layers.{index}.page_score.query"]
    return sizes[index], shape[-1]


def converted_tokenizer(folder: Path) -> bool:
    """Whether a model that `save_model` wrote has a tokenizer.

    Raises:
        ValueError: see `load_converted`.
    """
    return read_about(folder, KIND)["tokenizer"] is not None


def load_converted(folder: Path, dtype: str | None = None, shardings: Shardings | None = None) -> Model:
    """Reads a model that `save_model` wrote, each weight to where it belongs and nowhere else.

    Args:
        folder: holds it.
        dtype: of the weights; None: as they were written.
        shardings: of the weights; None: all on the default device.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder was not finished, is damaged, of another version, or no model.
    """
    about = read_about(folder, KIND)
    config = _config(folder, about, dtype)
    shapes = _with_scores(jax.eval_shape(lambda: random_params(config, jax.random.key(0))), about)
    if shardings is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(_default_device()), shapes)
    else:
        places = shardings(config, shapes)
    targets = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places
    )
    arrays = read_arrays(folder, about, named_arrays(targets))
    params = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in named_arrays(shapes)])
    return Model(config, params, _tokenizer(folder, about))


def _with_scores(shapes: Params, about: dict) -> Params:
    """The weights as shapes with those of the learned scores that the folder has."""
    stored = about["arrays"]

    def score(index: int, page_size: int | None) -> LearnedScore | None:
        if page_size is None:
            return None
        named = {name: stored[f"layers.{index}.page_score.{name}"] for name in SCORE_ARRAYS}
        arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in named.items()}
        return LearnedScore(**arrays, page_size=page_size)

    sizes = about.get("score_page_sizes", [None] * len(shapes.layers))
    layers = tuple(
        layer.replace(page_score=score(index, size))
        for index, (layer, size) in enumerate(zip(shapes.layers, sizes, strict=True))
    )
    return shapes.replace(layers=layers)


def _config(folder: Path, about: dict, dtype: str | None) -> ModelConfig:
    try:
        config = from_json(ModelConfig, about["config"])
        parts = about["parts"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not describe a model ({error}); convert the model again") from error
    if parts != config.parts:
        raise ValueError(
            f"{folder} has matrices joined in {parts} parts, this version of retro-jax joins them in "
            f"{config.parts}; convert the model again"
        )
    return config if dtype is None else replace(config, dtype=dtype)


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device  # a platform's name, too
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def _tokenizer(folder: Path, about: dict) -> Tokenizer | None:
    if about["tokenizer"] is None:
        return None
    text = json.dumps(read_object(folder, "tokenizer"))
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(text), **about["tokenizer"])
    except Exception as error:  # of `tokenizers`, whose errors have no other type
        raise ValueError(
            f"the tokenizer of {folder} is damaged ({error}); convert the model again"
        ) from error
