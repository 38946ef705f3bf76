"""The paper's figures (`paper.json`) beside runs with the same model, task, questions, budget and window."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from retro_jax.experiments.io.estimates import Interval, bootstrap
from retro_jax.experiments.report.data import Measured, paired, quest_of
from retro_jax.experiments.report.pictures import questions_groups
from retro_jax.presets import PRESETS

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
    for table in PAPER["tables"]:
        for group in _same_setting(table, runs):
            for figure in table["figures"]:
                told = figure["method"], figure.get("window"), figure.get("budget")
                names = [run.find(*told) for run in group]
                values = [
                    _values(run, name, table["quantity"]) if name else []
                    for run, name in zip(group, names, strict=True)
                ]
                if all(values):
                    scaled = [[100 * value for value in of_run] for of_run in values]
                    ours, what = bootstrap(*scaled), QUANTITIES[table["quantity"]]
                    rows.append(_row(group, names[0], what, ours, figure["percent"], table["where"]))
    return rows + [row for run in runs for row in _exposure_rows(run)]


def _same_setting(table: Mapping, runs: Sequence[Measured]) -> list[list[Measured]]:
    """The runs that figures can be compared with, by comparison; several if they are means over n."""
    wanted = table["task"].items()
    alike = [
        run for run in runs if run.config["model"] == table["model"] and wanted <= run.config["task"].items()
    ]
    questions = table.get("n")
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
    own = PRESETS["mean-key"]["score"]  # another method than the paper's
    ours = [method for method in run.methods if run.configs[method].score != own]
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
