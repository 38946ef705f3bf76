"""The pictures of a report; each function returns a PNG file, or None where the runs do not show it."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.plots import COLOURS, DASHES, FULL_COLOUR, QUEST_COLOUR, picture
from experiments.report_data import Interval, Measured, bootstrap, by_bins, excess_by_position, same_json

BLOCK = 256
"""Tokens in a point of the curves of likelihood."""


def position_plot(run: Measured) -> bytes | None:
    """Score against the answer's position in the reply."""
    if run.is_likelihood:
        return None
    curves = {method: run.matrix(method, "scores") for method in run.methods}
    if any(not values.size or values.shape[1] < 2 for values in curves.values()):
        return None

    def draw(axes: Axes) -> None:
        for method, values in curves.items():
            _line(axes, run, method, *by_bins(values, bins=10))
        axes.set_xlabel("position of the answer in the reply")
        axes.set_ylabel("share right")

    return _picture(draw)


def excess_plot(run: Measured) -> bytes | None:
    """Excess negative log-likelihood against position."""
    if not run.is_likelihood or "full" not in run.methods:
        return None
    length = run.matrix("full", "nll").shape[1]
    curves = {
        method: excess_by_position(run, method, min(BLOCK, length))
        for method in run.methods
        if method != "full"
    }
    curves = {method: curve for method, curve in curves.items() if curve is not None}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        for method, (centres, intervals) in curves.items():
            _line(axes, run, method, centres, intervals)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("excess NLL over full attention (nats per token)")

    return _picture(draw)


def exposure_plot(run: Measured) -> bytes | None:
    """Exposure against the number of later steps."""
    curves = {method: run.exposure(method) for method in run.methods}
    curves = {method: curve for method, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for method, curve in curves.items():
            axes.plot(range(len(curve)), curve, "o-", color=_colour(run, method), markersize=3, label=method)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("later decode steps (window w: up to w - 1)")
        axes.set_ylabel("exposure (pages attended to / own step's)")

    return _picture(draw)


def budget_plot(run: Measured) -> bytes | None:
    """A run's value against the tokens that a step really loaded."""
    families: dict[str, list[str]] = {}
    for method in run.methods:
        if method != "full" and run.by_example(method):
            families.setdefault(method.rpartition("-")[0], []).append(method)
    if not any(len(labels) > 1 for labels in families.values()):
        return None

    def draw(axes: Axes) -> None:
        for number, (family, labels) in enumerate(families.items()):
            points = sorted(
                (run.mean(label, "pages_loaded") * run.config["decode"]["page_size"], label)
                for label in labels
            )
            intervals = [bootstrap(list(run.by_example(label).values())) for _, label in points]
            colour = QUEST_COLOUR if family == "quest" else COLOURS[number % len(COLOURS)]
            _curve(axes, np.array([x for x, _ in points]), intervals, colour, family)
        if "full" in run.methods:
            axes.axhline(
                bootstrap(list(run.by_example("full").values())).mean, color=FULL_COLOUR, label="full"
            )
        axes.set_xlabel("tokens loaded by a step, per layer and KV head")
        axes.set_ylabel("NLL (nats per token)" if run.is_likelihood else "score")

    return _picture(draw)


def latency_plot(run: Measured) -> bytes | None:
    """Wall time of a decode step against context, apart for each device and batch."""
    timed = [timing for timing in run.timings if timing["steps_per_second"]]
    if not timed:
        return None
    kinds = dict.fromkeys((timing["device"], timing["batch"]) for timing in timed)

    def draw(axes: Axes) -> None:
        for method, (kind, style) in itertools.product(run.methods, zip(kinds, itertools.cycle(DASHES))):
            points = sorted(
                (timing["context"], 1000 / timing["steps_per_second"])
                for timing in timed
                if timing["method"] == method and (timing["device"], timing["batch"]) == kind
            )
            if points:
                x, y = zip(*points, strict=True)
                about = f", {kind[0]}, batch {kind[1]}" if len(kinds) > 1 else ""
                axes.plot(
                    x, y, f"o{style}", markersize=3, color=_colour(run, method), label=f"{method}{about}"
                )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context (tokens, in the middle of the longest reply)")
        axes.set_ylabel("ms per step of a batch")

    return _picture(draw)


def questions_plot(runs: Sequence[Measured]) -> bytes | None:
    """Score against the number of questions in one prompt, over runs that differ in nothing else."""
    alike = questions_groups(runs)
    if not alike:
        return None

    def draw(axes: Axes) -> None:
        for group in alike:
            for method in group[0].methods:
                having = [run for run in group if run.by_example(method)]
                intervals = [bootstrap(list(run.by_example(method).values())) for run in having]
                name = f"{group[0].config['task']['source']} {method}"
                x = np.array([run.config["task"]["n"] for run in having])
                _curve(axes, x, intervals, _colour(group[0], method), name)
        axes.set_xlabel("questions in one prompt")
        axes.set_ylabel("score")

    return _picture(draw)


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


def _colour(run: Measured, method: str) -> str:
    if method == "full":
        return FULL_COLOUR
    others = [label for label in run.methods if label != "full" and not label.startswith("quest")]
    return COLOURS[others.index(method) % len(COLOURS)] if method in others else QUEST_COLOUR


def _line(axes: Axes, run: Measured, method: str, x: np.ndarray, intervals: Sequence[Interval]) -> None:
    quests = [label for label in run.methods if label.startswith("quest")]
    style = ("-", "--", ":", "-.")[quests.index(method) % 4 if method in quests else 0]  # they share a colour
    _curve(axes, x, intervals, _colour(run, method), method, style)


def _curve(
    axes: Axes, x: np.ndarray, intervals: Sequence[Interval], colour: str, name: str, style: str = "-"
) -> None:
    means = [value.mean for value in intervals]
    axes.plot(x, means, style, marker="o", markersize=3, color=colour, label=name)
    low, high = [value.low for value in intervals], [value.high for value in intervals]
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _picture(draw: Callable[[Axes], None]) -> bytes:
    def fill(axes: Sequence[Axes]) -> None:
        draw(axes[0])
        axes[0].legend(loc="best")

    return picture(1, fill)
