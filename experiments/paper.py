"""The paper's figures (`paper.json`) beside runs with the same model, task, questions, budget and window."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from retro_jax.experiments.report_data import Interval, Measured, bootstrap, paired, quest_of
from retro_jax.experiments.report_plots import questions_groups
from retro_jax.presets import EARLIER_NAMES

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text())
"""Of these, `figures` have the setting of a run; no run can stand beside those `without_setting`."""
PAPER_NOTE = (
    f"{PAPER['paper']}, as read in {PAPER['read_in']}. Accuracies and their differences are in percent; "
    "model, task, number of questions, budget and window are the paper's, while prompts, examples and other "
    "settings may differ. Exposure stands beside that of any run, as the source does not say where it was "
    "measured."
)
QUANTITIES = {"value": "accuracy", "minus_full": "less full", "minus_quest": "less Quest"}


def paper_rows(runs: Sequence[Measured]) -> list[dict]:
    """The paper's figures whose setting the runs have, as JSON values.

    Each has `model`, `task`, `method`, `quantity`, `ours` (the fields of an `Interval`), `paper`, and `where`
    in the paper it is from.
    """
    rows = []
    for figure in PAPER["figures"]:
        for group in _same_setting(figure, runs):
            for method, percent in figure["percent"].items():
                values = [_values(run, method, figure["quantity"]) for run in group]
                if all(values):
                    scaled = [[100 * value for value in of_run] for of_run in values]
                    what = QUANTITIES[figure["quantity"]]
                    rows.append(_row(group, method, what, bootstrap(*scaled), percent, figure["where"]))
    return rows + [row for run in runs for row in _exposure_rows(run)]


def _same_setting(figure: Mapping, runs: Sequence[Measured]) -> list[list[Measured]]:
    """The runs that a figure can be compared with, by comparison; several if it is a mean over n."""
    wanted = figure["task"].items()
    alike = [
        run for run in runs if run.config["model"] == figure["model"] and wanted <= run.config["task"].items()
    ]
    questions = figure.get("n")
    if questions is None:
        return [[run] for run in alike]
    if len(questions) == 1:
        return [[run] for run in alike if run.config["task"]["n"] == questions[0]]
    groups = questions_groups([run for run in alike if run.config["task"]["n"] in questions])
    return [group for group in groups if [run.config["task"]["n"] for run in group] == questions]


def _values(run: Measured, method: str, quantity: str) -> list[float]:
    """One value for each example; none where the run does not have them."""
    if quantity == "value":
        return list(run.by_example(method).values())
    other = "full" if quantity == "minus_full" else quest_of(run, method)
    return paired(run, method, other) if other else []


def _exposure_rows(run: Measured) -> list[dict]:
    """The exposure of the run's widest windows, after as many later steps as the paper tells."""
    others = tuple(f"preset_{name}" for name in ("mean-key", *EARLIER_NAMES))  # not the paper's
    ours = [method for method in run.methods if not method.startswith(others)]
    curves = {method: run.matrix(method, "exposure") for method in ours}
    widest = max((curve.shape[1] for curve in curves.values()), default=0)
    return [
        _row([run], method, f"exposure after {steps}", bootstrap(curve[:, int(steps)]), paper, "motivation")
        for method, curve in curves.items()
        for steps, paper in PAPER["exposure"].items()
        if int(steps) < curve.shape[1] == widest and not np.isnan(curve).any()
    ]


def _row(
    runs: Sequence[Measured], method: str, quantity: str, ours: Interval, paper: float, where: str
) -> dict:
    task = runs[0].config["task"]
    questions = ", ".join(str(run.config["task"]["n"]) for run in runs if "n" in task)
    return {
        "model": runs[0].config["model"],
        "task": " ".join(filter(None, [task["name"], task.get("source"), questions and f"n = {questions}"])),
        "method": method,
        "quantity": quantity,
        "ours": asdict(ours),
        "paper": paper,
        "where": where,
    }
