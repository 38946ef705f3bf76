"""Flags that several commands share."""

import itertools
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.compile_cache import keep_programs
from experiments.progress import Progress
from retro_jax import PRESETS, DecodeConfig, Model, Sampling, load_model

Flag = tyro.conf.FlagCreatePairsOff
Hidden = tyro.conf.Suppress


@dataclass(frozen=True)
class ConfigFlags(DecodeConfig):
    """How to decode: every field of `DecodeConfig`, checked by `config` and not while flags are read."""

    def __post_init__(self):
        pass

    def config(self, **changes) -> DecodeConfig:
        """Returns the configuration, with some fields replaced.

        Raises:
          ValueError: a field is out of its range, or two fields contradict each other.
        """
        return DecodeConfig(**_values(self, DecodeConfig) | changes)


_preset: ContextVar[str | None] = ContextVar("preset", default=None)


def choose_preset(arguments: Sequence[str]) -> None:
    """Makes the preset that the arguments name, if any, the defaults of the flags that are read next."""
    name = None
    for flag, value in itertools.pairwise([*arguments, ""]):
        if flag.startswith("--preset="):
            name = flag.partition("=")[2]
        elif flag == "--preset":
            name = value
    _preset.set(name if name in PRESETS else None)  # an unknown one is refused where the flag is read


def preset_flags() -> ConfigFlags:
    """Returns the defaults of the flags: those of the chosen preset, else of `DecodeConfig`."""
    return ConfigFlags(**PRESETS.get(_preset.get(), {}))


def common_flags(*hidden: str) -> type[ConfigFlags]:
    """Returns `ConfigFlags` without the flags of some fields, in which the runs of a command differ."""
    fixed = [
        (field.name, Hidden[field.type], field.default)
        for field in fields(DecodeConfig)
        if field.name in hidden
    ]
    return make_dataclass("CommonConfigFlags", fixed, bases=(ConfigFlags,), frozen=True)


@dataclass(frozen=True)
class SamplingFlags(Sampling):
    """How tokens are chosen, checked by `sampling` and not while flags are read."""

    def __post_init__(self):
        pass

    def sampling(self) -> Sampling:
        """Returns the value.

        Raises:
          ValueError: a field is out of its range.
        """
        return Sampling(**_values(self, Sampling))


NoPrefix = tyro.conf.arg(name="")
Preset = Literal[tuple(PRESETS)]
ConfigArguments = Annotated[ConfigFlags, NoPrefix]
SamplingArguments = Annotated[SamplingFlags, NoPrefix]


@dataclass(kw_only=True)
class Output:
    """How any command shows its results and its errors."""

    json: Flag[bool] = False
    """Print one JSON object on stdout, and nothing else there."""
    traceback: Flag[bool] = False
    """Show where an error was raised, not only what it says."""


@dataclass(kw_only=True)
class Command(Output):
    """A command on one model."""

    model: tyro.conf.Positional[str]
    """A preset ("smollm2-135m"), a Hugging Face hub id ("org/name") or folder, a .gguf file, or "random:NAME"
    for seeded random weights of a named size."""
    dtype: str | None = None
    """Of weights, activations and cache, "float32" or "bfloat16"; None: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    def load(self) -> Model:
        """Reads the model, after downloading it where it is not cached."""
        keep_programs()
        with Progress() as progress:
            return load_model(self.model, dtype=self.dtype, revision=self.revision, progress=progress)


@dataclass(kw_only=True)
class TextCommand(Command):
    """A command on given text."""

    text: tuple[Path, ...] = ()
    """UTF-8 text files; several are scored as one batch."""
    token_ids: Path | None = None
    """Instead of text: a .npy file of integers, shape (tokens,) or (texts, tokens)."""
    tokens: int | None = 4096
    """Length of each text, the prompt included; None: all tokens of the shortest."""
    prompt_tokens: int = 1024
    """Tokens at the beginning that are read at once with full attention and not scored."""
    skip_chars: int = 0
    """Characters left out at the start of each text file, such as a title page."""
    bin_tokens: int = 1024
    """Width of the ranges of positions in the tables."""


def _values(flags, kind: type) -> dict:
    return {field.name: getattr(flags, field.name) for field in fields(kind)}
