"""What rows of a study change beside a base, in percent of its excess.

`python -m retro_jax.experiments.study.differences FOLDER` makes the tables of a folder's block means. Rows
are named after what they add: "Quest, a sink page, top-p 0.9" is a row of "Quest, a sink page". They need not
be variants that `retro-jax study` runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from retro_jax.experiments.io.estimates import BLOCK, UNTOLD, estimate, ratio
from retro_jax.experiments.io.files import write_bytes
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.study.data import Cell, Result, load
from retro_jax.experiments.study.tables import text_error
from retro_jax.experiments.study.variants import PRESET, SINK, WINDOW, revised

SCORED = (PRESET, f"{PRESET}, pages of 8")
CHOSEN = {"learned score": "Learned scores", "exact selection": "Exact selection"}
"""Rows of scores made by hand; how the names of rows of others begin, and what they are called."""
COMPARED = (
    ("Forms of revision", SINK, revised(WINDOW, sink=True)),
    ("Pages chosen or loaded otherwise", SINK, SINK),
    (f"Beside {PRESET}", PRESET, PRESET),
    *((f"{words}, beside {base}", base, start) for base in SCORED for start, words in CHOSEN.items()),
)
"""Title, base, and what the names of the rows begin with."""
WORDS = (
    "Excess negative log-likelihood over full attention less that of the base on the same tokens, in percent "
    "of the base's excess: below 0 is better than the base. ± is one paired standard error, from the means "
    f"of blocks of {BLOCK} tokens. MB are those that a step loads for a text. A budget up to 1 is a share of "
    "the context, above it tokens. Worse and better: beyond two errors, from blocks and from the means of "
    "texts, of all models, kinds of text and budgets that were measured. "
    f"{UNTOLD}."
)


def page(cells: Sequence[Cell]) -> str:
    """Returns all tables.

    Args:
      cells: of one study; what did not run is left out.
    """
    parts = ["# Differences from a base, by model and kind of text", WORDS]
    for title, base, start in COMPARED:
        names = rows(cells, base, start)
        if names:
            parts += [f"## {title}", f"Base: {base}.", verdicts(cells, base, start)]
            for budget in dict.fromkeys(run.budget for one in cells for run in one.results):
                parts += [f"Budget {budget:g}", differences(cells, base, start, budget)]
    for one in cells:
        parts += [
            f"## {one.name}",
            f"{len(one.texts)} texts ({', '.join(one.texts)}), {one.tokens - one.prompt_tokens} tokens of "
            f"each after a prompt of {one.prompt_tokens}, {one.dtype}. Full attention: {one.full.mean():.4f} "
            f"nats per token, {one.full_bytes / 1e6:.1f} MB a step.",
        ]
    return "\n\n".join(parts) + "\n"


def rows(cells: Sequence[Cell], base: str, start: str) -> list[str]:
    """Returns the names that begin with `start`, but the base's, in the order of the data."""
    names = dict.fromkeys(run.variant for one in cells for run in one.results)
    return [name for name in names if name != base and f"{name}, ".startswith(f"{start}, ")]


def verdicts(cells: Sequence[Cell], base: str, start: str) -> str:
    """Returns how often each row is worse and better than the base, and its lowest and highest difference."""
    body = []
    for name in rows(cells, base, start):
        both = [pair for one in cells for pair in pairs(one, name, base)]
        by_blocks, by_texts, percent = [], [], []
        for own, other in both:
            difference = own.excess - other.excess
            by_blocks.append(difference.mean() / estimate(difference, block=1).error)
            by_texts.append(difference.mean() / text_error(difference))
            percent.append(100 * ratio(difference, other.excess, block=1).mean)
        counts = [f"{sum(sign * z > 2 for z in part)}" for part in (by_blocks, by_texts) for sign in (1, -1)]
        told = [value for value in percent if not np.isnan(value)]
        ends = [f"{end(told):+.1f}" if told else "-" for end in (min, max)]
        body.append([_short(name, start), *counts, f"{len(both)}", *ends])
    header = ["worse", "better", "worse by texts", "better by texts", "of", "lowest %", "highest %"]
    return markdown(["", *header], body)


def differences(cells: Sequence[Cell], base: str, start: str, budget: float) -> str:
    """Returns each row's difference from the base at one budget, by model and kind of text.

    Where rows are of the base's own name they load other bytes than it, and MB stand beside.
    """
    traffic = base == start

    def line(words: str, found: Sequence[tuple[str, Result | None]]) -> list[str]:
        shown = []
        for text, run in found:
            shown += [text, f"{run.kv_bytes / 1e6:.1f}" if run else ""] if traffic else [text]
        return [words, *shown]

    bases = [one.result(base, budget) for one in cells]
    body = [
        line(f"{base}: nats", [(f"{run.excess.mean():.4f}" if run else "", run) for run in bases]),
    ]
    for name in rows(cells, base, start):
        found = [one.result(name, budget) for one in cells]
        texts = [
            (_percent(own, other), own) if own and other else ("", None)
            for own, other in zip(found, bases, strict=True)
        ]
        if any(own for _, own in texts):
            body.append(line(_short(name, start), texts))
    header = [words for one in cells for words in ((one.name, "MB") if traffic else (one.name,))]
    return markdown(["", *header], body)


def pairs(one: Cell, name: str, base: str) -> list[tuple[Result, Result]]:
    """Returns a row beside the base, at every budget where both ran."""
    own = [run for run in one.results if run.variant == name]
    return [(run, other) for run in own if (other := one.result(base, run.budget)) is not None]


def _percent(own: Result, other: Result) -> str:
    share = ratio(own.excess, other.excess, block=1)
    if np.isnan(share.mean):
        return "-"
    return f"{100 * (share.mean - 1):+.1f} ± {100 * share.error:.1f}"


def _short(name: str, start: str) -> str:
    return name.removeprefix(start).removeprefix(", ") or start


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Make the tables of differences again from the block means of studies."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Each with block means, and for its tables."""

    def run(self) -> None:
        """Writes `tables.md` into each folder."""
        for folder in self.folders:
            write_bytes(folder / "tables.md", page(load(folder)).encode())


if __name__ == "__main__":
    tyro.cli(Differences).run()
