"""What can be told of a model by its name, before it is fetched or read."""

import re
from dataclasses import replace

from retro_jax.experiments.io.files import read_json
from retro_jax.models.config import ModelConfig
from retro_jax.models.formats.huggingface import config_from_json
from retro_jax.models.load import local_path
from retro_jax.models.presets import SIZES


def known_model(name: str, dtype: str | None) -> ModelConfig | None:
    """A model's sizes without fetching it: of a preset, a local folder, or a hub model of a known size."""
    file = local_path(name) / "config.json"
    if file.is_file():
        return config_from_json(read_json(file, "fetch the model again"), name, dtype)
    size = name.removeprefix("random:").rpartition("/")[2].lower()
    size = size.removesuffix("-instruct").removesuffix("-it").removeprefix("meta-")
    size = re.sub(r"-\d{4}(?=-)", "", size)  # a month, as in OLMo-2-1124-7B
    found = {known.replace("-", ""): config for known, config in SIZES.items()}.get(size.replace("-", ""))
    return found and replace(found, name=name, dtype=dtype or found.dtype)
