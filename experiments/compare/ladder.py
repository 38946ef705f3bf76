"""From Quest to the best configuration at the same memory traffic, one part after another."""

from dataclasses import replace
from typing import TYPE_CHECKING

from retro_jax.presets import PRESETS

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

LADDER = (
    ("Quest", {}),
    ("a sink page", {"sink_pages": 1}),
    ("scored by mean keys", {"score": "mean_key"}),
    ("in shares of attention", {"group_reduce": "mass"}),
    ("the bytes saved spent on pages", {"budget_covers": "traffic"}),
    ("mean keys in 8 bits: preset mean-key", {"statistics": "mean_key_int8"}),
)
"""What leads from Quest to preset mean-key: each part in words, and what it sets beside all before it."""


PAPER_WINDOWS = (2, 4, 8)


def ladder(full: "DecodeConfig", budget: dict) -> "list[DecodeConfig]":
    """Returns the configurations of `LADDER` at one budget; `full` has the fields that all share."""
    found, fields = [], dict(PRESETS["quest"]) | budget
    for _, part in LADDER:
        fields = fields | part
        found.append(replace(full, **fields))
    return found


def beside_ladder(full: "DecodeConfig", budget: dict) -> "dict[str, DecodeConfig]":
    """Returns the paper's method at one budget, by words: Quest of the ladder's first step, with a window."""
    quest = ladder(full, budget)[0]
    return {
        f"RetroAttention as in the paper, w = {window}": replace(quest, method="retro", window=window)
        for window in PAPER_WINDOWS
    }
