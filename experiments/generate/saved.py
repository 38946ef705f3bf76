"""What a saved state was made with and has generated so far."""

from pathlib import Path
from typing import Any

from retro_jax import Generation, Model
from retro_jax.experiments.io.flags import ConfigFlags, SamplingFlags
from retro_jax.models.config_json import from_json
from retro_jax.saved_states import read_state_about


def made_with(folder: Path) -> dict[str, Any]:
    """Values of the flags `dtype`, `config`, `sampling` and `verify` that a state in a folder was made with.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it was not finished, is damaged, or holds no state of `generate`.
    """
    about = read_state_about(folder)
    generation = about["generation"]
    if generation is None:
        raise ValueError(
            f"{folder} holds the state of a loop of one's own, which does not know what it has generated; go "
            "on with it in Python, by retro_jax.load_state"
        )
    return {
        "dtype": about["model"]["dtype"],
        "config": from_json(ConfigFlags, about["config"]),
        "sampling": from_json(SamplingFlags, generation["sampling"]),
        "verify": generation["verify"],
    }


def turn_texts(model: Model, result: Generation) -> list[str]:
    """The texts of all tokens since the last prompts, those of earlier calls too, without stop tokens."""
    if model.tokenizer is None:
        return [""] * len(result.turns)
    turns = zip(result.turns, result.finished, strict=True)
    return [model.tokenizer.decode(turn[:-1] if ended else turn) for turn, ended in turns]


def so_far(model: Model, saved: Generation) -> str:
    """The text of the only sequence of a saved state that what comes next is joined to."""
    (text,) = turn_texts(model, saved)
    return text.rstrip("\ufffd")  # a character that is not whole yet comes with what completes it
