"""What can be told of a model before it is fetched or read, and its learned score."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retro_jax.experiments.io.files import read_json
from retro_jax.models.config import ModelConfig
from retro_jax.models.formats.checkpoint import is_checkpoint
from retro_jax.models.formats.converted import converted_config, converted_score, converted_tokenizer
from retro_jax.models.formats.huggingface import config_from_json
from retro_jax.models.formats.huggingface_tokenizer import has_tokenizer
from retro_jax.models.load import local_path
from retro_jax.models.presets import SIZES
from retro_jax.score_files import load_score, read_about

if TYPE_CHECKING:
    from retro_jax import DecodeConfig, Model


def known_model(name: str, dtype: str | None) -> ModelConfig | None:
    """A model's sizes without fetching it: of a preset, a local folder, or a hub model of a known size."""
    if name and is_checkpoint(folder := local_path(name)):
        return converted_config(folder, dtype)
    file = local_path(name) / "config.json"
    if file.is_file():
        return config_from_json(read_json(file, "fetch the model again"), name, dtype)
    size = name.removeprefix("random:").rpartition("/")[2].lower()
    size = size.removesuffix("-instruct").removesuffix("-it").removeprefix("meta-")
    size = re.sub(r"-\d{4}(?=-)", "", size)  # a month, as in OLMo-2-1124-7B
    found = {known.replace("-", ""): config for known, config in SIZES.items()}.get(size.replace("-", ""))
    return found and replace(found, name=name, dtype=dtype or found.dtype)


def known_tokenizer(name: str) -> bool | None:
    """Whether a model has a tokenizer, without fetching it; None: that cannot be told."""
    if name in {f"random:{size}" for size in SIZES}:
        return False
    folder = local_path(name)
    if name and is_checkpoint(folder):
        return converted_tokenizer(folder)
    return has_tokenizer(folder) if (folder / "config.json").is_file() else None


def check_tokenizer(name: str, there: bool | None, way: str) -> None:
    """Refuses a model without a tokenizer.

    Args:
      name: of the model.
      there: whether it has one; None: that is not known yet.
      way: what it cannot do without, and the way out, in words.

    Raises:
      ValueError: it has none.
    """
    if there is False:
        raise ValueError(f"{name} has no tokenizer{way}")


def check_positions(model: ModelConfig, needed: int, flag: str, value: int, beside: str = "") -> None:
    """Refuses a sequence that is longer than the model's positions.

    Args:
      model: its sizes.
      needed: positions of the longest sequence.
      flag: that could be lower.
      value: of the flag.
      beside: what else takes positions, in words; "" if nothing does.

    Raises:
      ValueError: they are more than the model has.
    """
    if needed <= model.max_positions:
        return
    fits = value - (needed - model.max_positions)
    way = f"use {flag} {fits} at most" if fits > 0 else f"none would fit, so lower {beside}"
    raise ValueError(
        f"{flag} {value}{f' with {beside}' * bool(beside)} take {needed} positions, {model.name} has "
        f"{model.max_positions}; {way}"
    )


def check_learned(folder: Path | None, configs: "Sequence[DecodeConfig]", model: str) -> None:
    """Refuses, before a model is read, a learned score that is not there or that nothing uses.

    Args:
      folder: of --learned; None: it was not given.
      configs: that the command decodes by.
      model: the model's name; a folder of `save_model` may hold a score, which --learned takes the place of.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a configuration selects by a learned score and there is none, or a folder was given and none
        does; it holds no finished score, or one for other pages or channels.
    """
    using = [config for config in configs if config.selects_by_learned]
    if folder is not None:
        about = read_about(folder)
        if not using:
            raise ValueError(f"--learned {folder} was given and nothing selects by it; add --score learned")
        trained = about["page_size"], about["channels"]
    elif not using:
        return
    else:
        written = bool(model) and is_checkpoint(folder := local_path(model))
        if not written or (trained := converted_score(folder)) is None:
            raise ValueError(
                "--score learned needs --learned FOLDER, or a model that was written with a score: "
                "`retro-jax learn` trains one for a model"
            )
    for config in using:
        for field, has in zip(("page_size", "score_channels"), trained, strict=True):
            if getattr(config, field) != has:
                flag = f"--{field.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is {getattr(config, field)}, but the score in {folder} was trained with {has}; "
                    f"use {flag} {has}, or train another"
                )


def with_score(model: "Model", folder: Path | None) -> "Model":
    """The model with the learned score of a folder, if there is one; raises as `load_score`."""
    return model if folder is None else load_score(model, folder)
