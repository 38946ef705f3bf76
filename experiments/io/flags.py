"""Flags that several commands share. Reading and showing them starts no JAX."""

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeVar

import tyro

from retro_jax.experiments.io.files import finite
from retro_jax.experiments.io.progress import Progress
from retro_jax.fields import DecodeFields, SamplingFields
from retro_jax.presets import EARLIER_NAMES, PRESETS, preset_fields

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from retro_jax import DecodeConfig, Model, Sampling
    from retro_jax.experiments.io.text import Texts
    from retro_jax.models.config import ModelConfig

Flag = tyro.conf.FlagCreatePairsOff
_T = TypeVar("_T")
Hidden = tyro.conf.Fixed[tyro.conf.Suppress[_T]]
"""A field that is no flag: in no help (suppressed), and in no completion (fixed)."""


@dataclass(frozen=True)
class ConfigFlags(DecodeFields):
    """How to decode: every field of `DecodeConfig`, checked by `config` and not while flags are read."""

    def config(self, **changes) -> "DecodeConfig":
        """Returns the configuration, with some fields replaced.

        Raises:
          ValueError: a field is out of its range, or two fields contradict each other.
        """
        from retro_jax import DecodeConfig

        return DecodeConfig(**_values(self, DecodeFields) | changes)

    def configs(self, methods: Mapping[str, Mapping[str, object]]) -> "dict[str, DecodeConfig]":
        """Returns the configurations of several methods, each by the fields that it sets itself.

        A field that only some kinds of methods have stays at its default for the others, as in a comparison.

        Raises:
          ValueError: a field is out of its range, two contradict each other, or no method has a field that
            was set.
        """
        from retro_jax.config import absent_fields
        from retro_jax.methods import METHODS

        absent = {
            name: absent_fields(own["method"], own.get("window", self.window))
            for name, own in methods.items()
        }
        nowhere = frozenset.intersection(*absent.values()) if absent else frozenset()
        defaults = {field.name: field.default for field in fields(DecodeFields)}
        for name in sorted(nowhere):
            having = [method for method in METHODS if name not in absent_fields(method)]
            asked = any(own["method"] in having for own in methods.values())  # with a window that lacks it
            if (value := getattr(self, name)) != defaults[name] and not asked:
                raise ValueError(
                    f"{name} {value!r} was asked for, which none of {', '.join(methods)} has; add "
                    f"{' or '.join(having)}, or leave --{name.replace('_', '-')} out"
                )
        return {
            name: self.config(**{field: defaults[field] for field in absent[name] - nowhere} | dict(own))
            for name, own in methods.items()
        }


def common_flags(*hidden: str) -> type[ConfigFlags]:
    """Returns `ConfigFlags` without the flags of some fields, in which the runs of a command differ."""
    fixed = [
        (field.name, Hidden[field.type], field.default)
        for field in fields(DecodeFields)
        if field.name in hidden
    ]
    return make_dataclass("CommonConfigFlags", fixed, bases=(ConfigFlags,), frozen=True)


@dataclass(frozen=True)
class SamplingFlags(SamplingFields):
    """How tokens are chosen, checked by `sampling` and not while flags are read."""

    def sampling(self) -> "Sampling":
        """Returns the value.

        Raises:
          ValueError: a field is out of its range.
        """
        from retro_jax import Sampling

        return Sampling(**_values(self, SamplingFields))


NoPrefix = tyro.conf.arg(name="")
ConfigArguments = Annotated[ConfigFlags, NoPrefix]
SamplingArguments = Annotated[SamplingFlags, NoPrefix]


@dataclass(kw_only=True)
class Output:
    """How any command shows its results and its errors."""

    json: Flag[bool] = False
    """Print one JSON object on stdout, and nothing else there."""
    traceback: Flag[bool] = False
    """Show where an error was raised, not only what it says."""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self | None:
        """Returns the values of flags that are not given; None: those that the fields have."""
        return None

    def show(self, values: dict, text: str) -> None:
        """Prints values as one JSON object where that is asked for, else the text."""
        print(json.dumps(finite(values)) if self.json else text.rstrip("\n"))


@dataclass(kw_only=True)
class Command(Output):
    """A command on one model."""

    model: tyro.conf.Positional[str]
    """A preset ("smollm2-135m"), a Hugging Face hub id ("org/name") or folder, a folder that `convert` wrote,
    a .gguf file, or "random:NAME" for seeded random weights of a named size."""
    dtype: str | None = None
    """Of weights, activations and a cache without --cache-dtype, "float32" or "bfloat16"; None: the model's
    own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    learned: Path | None = None
    """Folder that `retro-jax learn` has written for this model; what --score learned selects pages by."""
    data_devices: ClassVar[int] = 1
    model_devices: ClassVar[int] = 1

    def mesh(self) -> "Mesh | None":
        """Returns the devices that the model lies on; None: the default one."""
        return None

    def load(
        self,
        configs: "Sequence[DecodeConfig]",
        batch: int,
        capacity: int,
        *,
        together: int = 1,
        check: "Callable[[ModelConfig], None] | None" = None,
        without_tokenizer: str = "",
    ) -> "Model":
        """Reads the model, after downloading it where it is not cached, onto its devices.

        Args:
          configs: how it will decode.
          batch: rows of the state, at least.
          capacity: tokens of each that the cache holds, at least.
          together: of how many of them, as they follow each other, the caches are held at once.
          check: raises ValueError for sizes of a model that what was asked for does not fit.
          without_tokenizer: how a model without a tokenizer is refused, see `check_tokenizer`; "": it is not.

        Raises:
          ValueError: JAX does not start, or the model is refused by one of these, or does not divide over the
            devices or fit their memory; told before the model is read where its name or its config.json tells
            its size.
        """
        import jax

        from retro_jax import load_model
        from retro_jax.experiments.io.models import check_tokenizer, with_score
        from retro_jax.experiments.machine.compile_cache import keep_programs
        from retro_jax.sharding import params_on, shard_params

        mesh = self.mesh()
        refusals = {"together": together, "check": check, "without_tokenizer": without_tokenizer}
        known = self.check_known(configs, batch, capacity, **refusals)
        late = self.learned is not None  # a score is computed with weights that lie whole
        host = contextlib.nullcontext()
        if mesh is not None:
            host = jax.default_device(jax.local_devices(backend="cpu")[0])
        with Progress() as progress, host:
            model = load_model(
                self.model,
                dtype=self.dtype,
                revision=self.revision,
                progress=progress,
                shardings=None if mesh is None or late else params_on(mesh),
            )
            model = with_score(model, self.learned)
        if mesh is not None and late:
            model = replace(model, params=shard_params(model.params, model.config, mesh))
        keep_programs()
        if without_tokenizer:
            check_tokenizer(model.config.name, model.tokenizer is not None, without_tokenizer)
        if not known:
            if check is not None:
                check(model.config)
            self.check_memory(model.config, configs, batch, capacity, loaded=True, together=together)
        return model

    def check_known(
        self,
        configs: "Sequence[DecodeConfig]",
        batch: int,
        capacity: int,
        *,
        together: int = 1,
        check: "Callable[[ModelConfig], None] | None" = None,
        without_tokenizer: str = "",
    ) -> bool:
        """Refuses what `load` refuses, as far as it can be told before the model is fetched or read.

        Returns:
          Whether the model's sizes are known.
        """
        from retro_jax.experiments.io.models import (
            check_learned,
            check_tokenizer,
            known_model,
            known_tokenizer,
        )
        from retro_jax.experiments.machine.devices import local_devices

        check_learned(self.learned, configs, self.model)
        if without_tokenizer:
            check_tokenizer(self.model, known_tokenizer(self.model), without_tokenizer)
        local_devices()
        if (known := known_model(self.model, self.dtype)) is None:
            return False
        if check is not None:
            check(known)
        self.check_memory(known, configs, batch, capacity, together=together)
        return True

    def check_memory(
        self,
        model: "ModelConfig",
        configs: "Sequence[DecodeConfig]",
        batch: int,
        capacity: int,
        *,
        loaded: bool = False,
        together: int = 1,
    ) -> None:
        """Raises ValueError if it does not fit the memory of the model's devices, or divide over them.

        Args:
          model: its sizes.
          configs: how it will decode.
          batch: rows of the state, which are filled up to a multiple of the devices.
          capacity: tokens of each that the cache holds.
          loaded: whether the weights lie in memory already.
          together: see `load`.
        """
        from retro_jax.experiments.machine.memory import check_memory

        check_memory(
            model,
            configs,
            -(-batch // self.data_devices) * self.data_devices,
            capacity,
            loaded=loaded,
            together=together,
            data_devices=self.data_devices,
            model_devices=self.model_devices,
        )


@dataclass(kw_only=True)
class OverDevices(Command):
    """A command on one model, which may be spread over several devices."""

    data_devices: int = 1
    """Devices over which sequences are spread."""
    model_devices: int = 1
    """Devices over which KV heads and weights are spread."""
    distributed: Flag[bool] = False
    """Spread the model over the devices of all processes in which the command was started (by srun, mpirun,
    on each host of a TPU slice); the first alone prints results and writes."""

    def mesh(self) -> "Mesh | None":
        """Returns the devices that the flags name; from then on processes but the first print no results."""
        import jax

        from retro_jax.experiments.machine.mesh import mesh_of_flags

        found = mesh_of_flags(self.data_devices, self.model_devices, distributed=self.distributed)
        if jax.process_index():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 until the process ends
        return found


@dataclass(kw_only=True)
class Configured(Output):
    """A command that decodes by one configuration, whose defaults a preset may give."""

    preset: Literal[(*PRESETS, *EARLIER_NAMES)] | None = None
    """Take the defaults of the flags below from a preset: Quest, the paper's method, or the best found at the
    same memory traffic, mean-key, which was named retro earlier."""
    config: ConfigArguments = field(default_factory=ConfigFlags)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self | None:
        """Returns the defaults with the fields of the preset that the arguments name, if they do."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--preset", nargs="?")
        name = parser.parse_known_args(list(arguments))[0].preset
        if name not in (*PRESETS, *EARLIER_NAMES):  # an unknown one is refused where the flag is read
            return None
        return cls(model=tyro.MISSING, config=ConfigFlags(**preset_fields(name)))


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

    def read(
        self, configs: "Sequence[DecodeConfig]", copies: int = 1, *, padded: bool = True
    ) -> "tuple[Model, Texts]":
        """Reads the model and the texts' tokens.

        Args:
          configs: how the texts will be decoded, one after another.
          copies: of the texts that are decoded at once.
          padded: whether the state has the rows and the room that `score` gives it, or just what is needed.

        Raises:
          FileNotFoundError: a text is not there.
          ValueError: the texts are not as the flags say, or do not fit the memory.
        """
        from retro_jax.experiments.io.text import Texts, read_tokens

        model = self.load(configs, **self.asked(copies, padded=padded))
        ids, names = read_tokens(model, self.text, self.token_ids, self.tokens, self.skip_chars)
        texts, asked = Texts(names, ids, self.prompt_tokens), self._room(*ids.shape, copies, padded)
        asked.pop("check")(model.config)
        self.check_memory(model.config, configs, **asked, loaded=True)
        return model, texts

    def asked(self, copies: int = 1, *, padded: bool = True) -> dict:
        """What `load` and `check_known` are told, without a model; see `read`."""
        from retro_jax.experiments.io.checks import check_least
        from retro_jax.experiments.io.text import WITHOUT_TOKENIZER, check_prompt, check_sources, file_tokens
        from retro_jax.inputs import check_token_ids

        check_least(bin_tokens=self.bin_tokens)
        check_sources(self.text, self.token_ids, self.tokens)
        texts, tokens = len(self.text), self.tokens
        ids = None if self.token_ids is None else file_tokens(self.token_ids, tokens)
        if ids is not None:
            texts, tokens = ids.shape
        if tokens is not None:
            check_prompt(self.prompt_tokens, tokens)
        room = self._room(texts, tokens or max(self.prompt_tokens + 1, 1), copies, padded)
        if ids is None:
            return room | {"without_tokenizer": WITHOUT_TOKENIZER}

        def check(model: "ModelConfig") -> None:
            room["check"](model)
            check_token_ids(model, ids, str(self.token_ids))

        return room | {"check": check}

    def _room(self, texts: int, tokens: int, copies: int, padded: bool) -> dict:
        """What so many texts of so many tokens take."""
        from retro_jax.experiments.io.models import check_positions
        from retro_jax.sizes import batch_rows, cache_capacity

        fits = functools.partial(check_positions, needed=tokens, flag="--tokens", value=tokens)
        batch, capacity = texts * copies, tokens
        if padded:
            batch, capacity = batch_rows(batch), cache_capacity(tokens)
        return {"batch": batch, "capacity": capacity, "check": fits}


def _values(flags, kind: type) -> dict:
    return {field.name: getattr(flags, field.name) for field in fields(kind)}
