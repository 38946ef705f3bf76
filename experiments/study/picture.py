"""A study's picture: excess against position, a row of panels for each model and kind of text."""

from collections.abc import Sequence

import numpy as np

from retro_jax.experiments.io.estimates import BLOCK, estimate, position_bins
from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import QUEST as QUEST_LOOK
from retro_jax.experiments.pictures.panels import Curves, Line, Scale, looks
from retro_jax.experiments.pictures.words import counted
from retro_jax.experiments.study.data import Cell, Result
from retro_jax.experiments.study.variants import EXACT, PRESET, QUEST, WINDOW, revised

SHOWN = (QUEST, revised(WINDOW), QUEST + EXACT, PRESET)
WIDTH = 1024
"""Tokens of a range of positions, whose mean is a point."""


def position_pictures(cells: Sequence[Cell], budgets: Sequence[float]) -> dict[str, bytes]:
    """PNG files by name: excess against position at some budgets; those that did not run are left out."""
    styles = looks(SHOWN, {QUEST: QUEST_LOOK})
    panels = [
        Curves(
            [_line(one, run, styles[name]) for name in SHOWN if (run := one.result(name, budget))],
            Scale("position"),
            Scale("excess NLL, nats", shown=(0.0,)),
            f"{one.name}, budget {budget:g}",
        )
        for one in cells
        for budget in budgets
    ]
    title = "Excess NLL over full attention against position"
    first = cells[0]
    scored = counted(first.tokens - first.prompt_tokens, "scored token")
    note = f"n = {counted(len(first.texts), 'text')} a panel, {scored} of each; means of {WIDTH} tokens"
    layout = Layout(across=len(budgets), most=4 * len(budgets), panel=(4.2, 2.6))
    return pictures("position", panels, title, [note], layout, "one standard error either side")


def _line(one: Cell, run: Result, look) -> Line:
    x, mean, error = [], [], []
    for start, end in position_bins(one.prompt_tokens, one.tokens, WIDTH):
        blocks = slice((start - one.prompt_tokens) // BLOCK, (end - one.prompt_tokens) // BLOCK)
        here = estimate(run.excess[:, blocks], block=1)
        x.append((start + end) / 2)
        mean.append(here.mean)
        error.append(here.error)
    mean, error = np.array(mean), np.nan_to_num(error)
    return Line(run.variant, look, x, mean, mean - error, mean + error)
