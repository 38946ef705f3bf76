"""What `--model_args` of the harness's own command line says: a model, how it decodes, what is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from retro_jax import DecodeConfig
from retro_jax.experiments.io.models import check_learned
from retro_jax.fields import DecodeFields
from retro_jax.models.names import nearest
from retro_jax.presets import preset_fields

MODEL = {
    "pretrained": str,
    "dtype": str | None,
    "revision": str | None,
    "preset": str | None,
    "learned": str | None,
}
EVALUATION = {"mode": str | None, "max_length": int | None, "max_gen_toks": int, "seed": int}
"""Arguments of `RetroJaxLM` that --model_args may give, and their types."""
DECODING = {field.name: field.type for field in fields(DecodeFields)}
NAMES = MODEL | EVALUATION | DECODING
DEFAULT_DEVICE = "cuda:0"
"""What the harness passes where --device is not given: it asks for nothing."""


@dataclass(frozen=True)
class Arguments:
    """What was asked for.

    Attributes:
      model: arguments of `load_model`.
      learned: folder of a learned score.
      config: how to decode.
      evaluation: arguments of `RetroJaxLM` beside these.
    """

    model: Mapping[str, str | None]
    learned: Path | None
    config: DecodeConfig
    evaluation: Mapping[str, object]


def read_arguments(given: Mapping[str, object], flags: Mapping[str, object]) -> Arguments:
    """Reads what the harness passes.

    Args:
      given: values of --model_args, by name: "pretrained" (as `load_model` takes it), "dtype", "revision",
        "preset", "learned" (a folder of `retro-jax learn`), fields of `DecodeConfig`, and `EVALUATION`.
      flags: --batch_size, --max_batch_size and --device of the harness; None where they were not given.

    Raises:
      ValueError: a name is unknown, a value out of its range, no model is named, a learned score is missing
        or not used, or a flag has no meaning here.
      FileNotFoundError: the folder of a learned score is not there.
    """
    for name in given:
        if name not in NAMES:
            raise ValueError(
                f"model argument {name!r} is unknown{nearest(name, NAMES)}; use pretrained=MODEL, dtype, "
                f"revision, preset, learned, {', '.join(EVALUATION)}, or a flag of `retro-jax generate` that "
                "says how to decode, such as method or budget_tokens"
            )
        kinds, value = get_args(NAMES[name]) or (NAMES[name],), given[name]
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
            raise ValueError(f"model argument {name}={value!r} is {type(value).__name__}, not {wanted}")
    if not given.get("pretrained"):
        raise ValueError("no model is named; give --model_args pretrained=MODEL, such as smollm2-135m")
    decoding = {name: given[name] for name in DECODING if name in given}
    if (preset := given.get("preset")) is not None:
        decoding = dict(preset_fields(preset)) | decoding
    if flags.get("device") not in (None, DEFAULT_DEVICE):
        raise ValueError(
            f"device {flags['device']!r} cannot be chosen here; leave --device out, and set JAX_PLATFORMS "
            "for another device than JAX picks"
        )
    if flags.get("max_batch_size") is not None:
        raise ValueError("no batch size is searched for; leave --max_batch_size out and give --batch_size")
    evaluation = {name: given[name] for name in EVALUATION if name in given}
    if (size := flags.get("batch_size")) is not None:
        if not str(size).isdecimal():
            raise ValueError(f"batch_size {size!r} is no number, and none is searched for; give one")
        evaluation["batch_size"] = int(size)
    model = {name: given.get(name) for name in ("dtype", "revision")}
    config = DecodeConfig(**decoding)
    learned = Path(given["learned"]) if given.get("learned") else None
    check_learned(learned, [config], given["pretrained"])
    return Arguments({"name": given["pretrained"]} | model, learned, config, evaluation)
