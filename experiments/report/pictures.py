"""The pictures of a report; each function returns PNG files by name, none where the runs do not show it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from retro_jax import DecodeConfig
from retro_jax.experiments.compare.pictures import EXCESS, EXPOSURE, LATER_STEPS
from retro_jax.experiments.io.budgets import budget_value
from retro_jax.experiments.io.estimates import LEAST_EXAMPLES, Interval, bootstrap
from retro_jax.experiments.io.settings import distinct_names
from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import FULL, LEVEL, QUEST, Curves, Line, Look, Scale, looks
from retro_jax.experiments.pictures.words import counted, shortened
from retro_jax.experiments.report.data import (
    Measured,
    by_bins,
    excess_by_position,
    same_json,
)

BLOCK = 256
"""Tokens in a point of the curves of likelihood, at most."""
BINS = 10
"""Points of a curve against position, at most."""
POSITION = Scale("position of the answer in the reply", whole=True)
SCORE = Scale("score (0 to 1)")
READ = Scale("MB of keys, values and page statistics that a step reads for a sequence")
CONTEXT = Scale("context (tokens, in the middle of the longest reply)")
STEP_TIME = Scale("ms per step of a batch", shown=(0.0,))
QUESTIONS = Scale("questions in one prompt", whole=True)
INTERVAL = f"95% bootstrap intervals over examples, where there are {LEAST_EXAMPLES} or more"
CurvesByMethod = Mapping[str, tuple[Sequence[float], Sequence[Interval]]]
"""Places and values of a curve for each method."""


def position_plot(run: Measured, stem: str) -> dict[str, bytes]:
    """Draws score against the answer's position in the reply."""
    panels = _by_budget(run, position_curves(run), POSITION, Scale("share right"))
    return _pictures(stem, panels, f"{_name(run)}: score by position", [run], share_y=True)


def position_curves(run: Measured) -> CurvesByMethod:
    """Score against the answer's position; nothing where a reply has one answer, or likelihoods."""
    if run.is_likelihood:
        return {}
    curves = {method: run.matrix(method, "scores") for method in run.methods}
    return {
        method: by_bins(values, bins=BINS)
        for method, values in curves.items()
        if values.size and values.shape[1] > 1
    }


def excess_plot(run: Measured, stem: str) -> dict[str, bytes]:
    """Draws excess negative log-likelihood against position."""
    lines = excess_curves(run)
    if not lines:
        return {}
    mean = f"mean of {counted(_block(run), 'token')} around it"
    panels = _by_budget(run, lines, Scale(f"position (tokens), {mean}", whole=True), EXCESS)
    title = f"{_name(run)}: excess NLL over full attention by position"
    return _pictures(stem, panels, title, [run], share_y=True)


def excess_curves(run: Measured) -> CurvesByMethod:
    """Excess negative log-likelihood against position; nothing without likelihoods or full attention."""
    if not run.is_likelihood or "full" not in run.methods:
        return {}
    return {
        method: curve
        for method in run.methods
        if method != "full" and (curve := excess_by_position(run, method, _block(run)))
    }


def _block(run: Measured) -> int:
    """Tokens in a point of `excess_curves`."""
    return min(BLOCK, max(1, run.matrix("full", "nll").shape[1] // BINS))


def exposure_plot(run: Measured, stem: str) -> dict[str, bytes]:
    """Draws exposure against later steps: of methods that differ in their window only, the widest's."""
    widest: dict[DecodeConfig, tuple[str, list[float]]] = {}
    for method in run.methods:
        kind, curve = replace(run.configs[method], window=None), run.exposure(method)
        if len(curve) > max(1, len(widest.get(kind, ("", ()))[1])):
            widest[kind] = method, curve
    lines = {
        method: (np.arange(len(curve)), [Interval(value, np.nan, np.nan) for value in curve])
        for method, curve in widest.values()
    }
    panels = _by_budget(run, lines, LATER_STEPS, EXPOSURE)
    return _pictures(stem, panels, f"{_name(run)}: exposure", [run], share_y=True)


def budget_plot(run: Measured, stem: str) -> dict[str, bytes]:
    """Draws a run's value against what a step really read."""
    families: dict[str, list[str]] = {}
    for method in run.methods:
        if method != "full" and run.by_example(method):
            families.setdefault(_family(run, method), []).append(method)
    if not any(len(labels) > 1 for labels in families.values()):
        return {}
    family_looks = _looks([run])
    lines, read = [], []
    for family, labels in families.items():
        points = sorted((run.mean(label, "kv_bytes") / 1e6, label) for label in labels)
        intervals = [bootstrap(list(run.by_example(label).values())) for _, label in points]
        x = [megabytes for megabytes, _ in points]
        read += x
        lines.append(_line(family, family_looks[family], x, intervals))
    if full := list(run.by_example("full").values()):
        lines.append(Line("full (reads more)", LEVEL, [min(read), max(read)], [np.mean(full)] * 2))
    panel = Curves(lines, READ, Scale("NLL (nats per token)") if run.is_likelihood else SCORE)
    return _pictures(stem, [panel], f"{_name(run)}: by budget", [run], panel=(6.0, 4.4))


def latency_plot(run: Measured, stem: str) -> dict[str, bytes]:
    """Draws wall time of a decode step against context, a panel for each device and batch."""
    timed = [timing for timing in run.timings if timing["steps_per_second"]]
    kinds = dict.fromkeys((timing["device"], timing["batch"]) for timing in timed)
    method_looks = _looks([run], whole=True)
    panels = []
    for device, batch in kinds:
        lines = []
        for method in run.methods:
            points = sorted(
                (timing["context"], 1000 / timing["steps_per_second"])
                for timing in timed
                if (timing["method"], timing["device"], timing["batch"]) == (method, device, batch)
            )
            if points:
                lines.append(Line(method, method_looks[method], *zip(*points, strict=True)))
        panels.append(Curves(lines, CONTEXT, STEP_TIME, f"{device}, batch {batch}"))
    note = f"{counted(len(timed), 'timed batch', 'timed batches')}, a point for each"
    return _pictures(stem, panels, f"{_name(run)}: wall time of a decode step", [run], note)


def questions_plot(runs: Sequence[Measured], stem: str) -> dict[str, bytes]:
    """Draws score against the number of questions in one prompt, over runs that differ in nothing else."""
    panels = []
    groups = questions_groups(runs)
    method_looks = _looks([run for group in groups for run in group], whole=True)
    for group in groups:
        lines = []
        for method in dict.fromkeys(method for run in group for method in run.methods):
            having = [run for run in group if run.by_example(method)]
            intervals = [bootstrap(list(run.by_example(method).values())) for run in having]
            x = [run.config["task"]["n"] for run in having]
            lines.append(_line(method, method_looks[method], x, intervals))
        about = f"{shortened(group[0].config['model'])}, {group[0].config['task']['source']}"
        panels.append(Curves(lines, QUESTIONS, SCORE, about))
    having = [run for group in groups for run in group]
    return _pictures(stem, panels, "Score by number of questions", having)


def questions_groups(runs: Sequence[Measured]) -> list[list[Measured]]:
    """Runs that ask several questions in one prompt and differ only in how many, two or more of them."""
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        if "n" in run.config["task"]:
            shared = run.config | {"task": run.config["task"] | {"n": None}, "limit": None, "batch": None}
            groups.setdefault(same_json(shared), []).append(run)
    return [
        sorted(group, key=lambda run: run.config["task"]["n"])
        for group in groups.values()
        if len({run.config["task"]["n"] for run in group}) > 1
    ]


def _by_budget(run: Measured, curves: CurvesByMethod, x: Scale, y: Scale) -> list[Curves]:
    """A panel of curves for each budget; full attention's, which has none, is in all of them."""
    family_looks = _looks([run])
    budgets = dict.fromkeys(budget for method in curves if (budget := _budget(run, method))) or {None: None}
    panels = []
    for budget in budgets:
        chosen = [method for method in curves if _budget(run, method) in (None, budget)]
        names = {method: _family(run, method) for method in chosen}
        lines = [_line(name, family_looks[name], *curves[method]) for method, name in names.items()]
        panels.append(Curves(lines, x, y, f"budget {budget:g}" if budget else ""))
    return panels


def _budget(run: Measured, method: str) -> float | None:
    """The budget of a method; None for full attention."""
    config = run.configs[method]
    return None if config.attention.dense else budget_value(config)


def _family(run: Measured, method: str) -> str:
    """The name of a method without its budget."""
    (name,) = distinct_names([run.configs[method]], told=("budget", "budget_tokens"))
    return name


def _looks(runs: Sequence[Measured], whole: bool = False) -> dict[str, Look]:
    """Looks of methods, by their families or by their whole names; full attention's and Quest's are known."""
    known, names = {}, []
    for run in runs:
        for method in run.methods:
            names.append(method if whole else _family(run, method))
            if run.configs[method].attention.dense:
                known[names[-1]] = FULL
            elif not whole and run.configs[method].method == "quest" and run.plain(method):
                known[names[-1]] = QUEST
    return looks(names, known)


def _line(name: str, look: Look, x: Sequence[float], intervals: Sequence[Interval]) -> Line:
    columns = ([getattr(value, part) for value in intervals] for part in ("mean", "low", "high"))
    return Line(name, look, x, *columns)


def _name(run: Measured) -> str:
    return f"{shortened(run.identity['name'], 40)}, {shortened(run.config['model'])}"


def _pictures(
    stem: str,
    panels: Sequence[Curves],
    title: str,
    runs: Sequence[Measured],
    note: str = "",
    share_y: bool = False,
    **layout,
) -> dict[str, bytes]:
    """Files of panels, on which stands how many examples there are."""
    counts = sorted(
        {
            len({line["example"] for line in run.lines if line["method"] == method})
            for run in runs
            for method in run.methods
        }
    )
    n = f"n = {counts[0]} to {counts[-1]} examples of each method" if len(counts) > 1 else ""
    n = n or (f"n = {counted(counts[0], 'example')}" if counts else "")
    return pictures(stem, panels, title, [n, note], Layout(share_y=share_y, **layout), INTERVAL)
