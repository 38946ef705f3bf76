"""The pictures of a comparison: excess against position, and against each setting that varies."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.budgets import budget_fields, budget_value
from experiments.estimates import BLOCK, block_means, estimate, running_mean
from experiments.ladder import LADDER, beside_ladder, ladder
from experiments.results import Run
from experiments.sweep import NAMES, Axis, columns, constants, label, order, run_name

FULL_COLOUR = "#888888"
QUEST_COLOUR = "#222222"
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours, told apart with every common kind of colour blindness; one per method and window;
with more of them, lines are dashed."""
DASHES = ("-", "--", ":", "-.")
SPAN = 8
"""Blocks in the running mean, fewer in a short text."""
PANELS = 3
"""In a row of a picture."""
EXCESS = "excess NLL over full attention (nats per token)"
SWEPT = {
    "budget": (
        "tokens loaded by a step, per layer and KV head",
        lambda run: run.pages_loaded * run.config.page_size,
    ),
    "page size": ("tokens of a page", lambda run: run.config.page_size),
    "window": ("window w (1 is Quest)", lambda run: run.config.slots),
}
"""The settings that excess is drawn against: what the horizontal axis shows, and its value for a run."""

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def comparison_figure(identity: dict, runs: Sequence[Run]) -> bytes:
    """Draws excess negative log-likelihood against position, and exposure.

    Lines are running means over blocks of tokens, bands one standard error to each side. Budgets, page sizes
    and other settings that differ have a panel for each combination.

    Args:
      identity: what the runs share, as `experiments.compare.identity` gives it.
      runs: full attention and at least one other.

    Returns:
      a PNG file.
    """
    full, others = _split(runs)
    panels = _panels(others, columns([run.config for run in others]))
    looks = _looks(map(_name, others))

    def draw(axes: Sequence[Axes]) -> None:
        for panel, (title, chosen) in zip(axes, panels.items(), strict=False):
            _share(panel, axes[0])
            _position_panel(panel, chosen, full, identity["prompt_tokens"], looks)
            panel.set_title(title)
        axes[0].set_ylabel(EXCESS)
        _legends(axes[:-1])
        _exposure_panel(axes[-1], [run for run in others if run.config.attention.scored], looks)

    return picture(len(panels) + 1, draw, _title(identity, runs))


def sweep_figure(identity: dict, runs: Sequence[Run], setting: str) -> bytes | None:
    """Draws excess negative log-likelihood against a setting, one of `SWEPT`.

    Points are means over all scored tokens, bars one standard error to each side.

    Args:
      identity: as in `comparison_figure`.
      runs: as in `comparison_figure`.
      setting: which.

    Returns:
      a PNG file; None where the setting does not vary (fewer than three windows say nothing of the window).
    """
    full, others = _split(runs)
    varying = columns([run.config for run in others])
    if setting == "window":
        others = [run for run in others if run.config.attention.scored]
        varies = len({run.config.slots for run in others}) > 2
    else:
        varies = setting in [axis.column for axis in varying]
    if not varies:
        return None
    words, value = SWEPT[setting]
    panels = _panels(others, [axis for axis in varying if axis.column != setting])

    line = _any_window if setting == "window" else _name
    looks = _looks(map(line, others))

    def draw(axes: Sequence[Axes]) -> None:
        for panel, (title, chosen) in zip(axes, panels.items(), strict=True):
            _share(panel, axes[0])
            panel.axhline(0.0, color="0.6", linewidth=0.8)
            for name in dict.fromkeys(map(line, chosen)):
                points = sorted((run for run in chosen if line(run) == name), key=value)
                excess = [estimate(run.nll - full.nll) for run in points]
                colour, dash = looks[name]
                panel.errorbar(
                    [value(run) for run in points],
                    [point.mean for point in excess],
                    [point.error for point in excess],
                    fmt=f"o{dash}", color=colour, markersize=4, linewidth=1.4, capsize=2, label=name,
                )  # fmt: skip
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_xlabel(words)
            panel.set_title(title)
        axes[0].set_ylabel(EXCESS)
        _legends(axes)

    return picture(len(panels), draw, _title(identity, runs))


def ladder_figure(identity: dict, runs: Sequence[Run]) -> bytes | None:
    """Draws excess against what a step reads: the steps of the ladder, the paper's method, further methods.

    Both axes are logarithmic; each line is one method at several budgets. What reads more than half of what
    full attention does, and random selection, are left out.

    Returns:
      a PNG file, or None where the ladder was not run.
    """
    full, others = _split(runs)
    by_name = {run.name: run for run in others}
    lines: dict[str, list[Run]] = {}
    for budget in map(budget_fields, sorted({budget_value(run.config) for run in others})):
        steps = ladder(full.config, budget)
        parts = {f"+ {words}": config for (words, _), config in zip(LADDER[1:], steps[1:], strict=True)}
        named = {"Quest": steps[0]} | parts
        for words, config in (named | beside_ladder(full.config, budget)).items():
            if run := by_name.pop(run_name(config), None):
                lines.setdefault(words, []).append(run)
    if f"+ {LADDER[-1][0]}" not in lines:
        return None
    for run in by_name.values():
        if run.kv_bytes < full.kv_bytes / 2 and run.config.score != "random":
            lines.setdefault(_name(run), []).append(run)

    def draw(axes: Sequence[Axes]) -> None:
        looks = itertools.product(DASHES, COLOURS)
        for (words, line), (dash, colour) in zip(lines.items(), looks, strict=False):
            line = sorted(line, key=lambda run: run.kv_bytes)
            axes[0].plot(
                [run.kv_bytes / 1e6 for run in line],
                [estimate(run.nll - full.nll).mean for run in line],
                dash,
                color=QUEST_COLOUR if words == "Quest" else colour,
                marker="o",
                markersize=3,
                label=words,
            )
        axes[0].set(xscale="log", yscale="log", ylabel=EXCESS)
        axes[0].set_xlabel("MB of keys, values and page statistics that a step reads for a text")
        axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[1].remove()  # room for the legend

    return picture(2, draw, _title(identity, runs))


def picture(panels: int, draw: Callable[[Sequence[Axes]], None], title: str = "") -> bytes:
    """A PNG file of so many panels, which `draw` fills."""
    across = min(panels, PANELS)
    down = -(-panels // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.4 * across, 6.4), 3.7 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for spare in axes[panels:]:
            spare.remove()
        draw(axes[:panels])
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()


def _split(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    """Full attention, and the others; without overwriting there is nothing to see but Quest."""
    full = next(run for run in runs if run.config.method == "full")
    return full, [run for run in runs if run is not full and run.config.overwrite]


def _panels(runs: Sequence[Run], apart: Sequence[Axis]) -> dict[str, list[Run]]:
    """Runs by the settings that have panels of their own, in words."""
    panels: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: order(run.config)):
        panels.setdefault(_settings(run, apart), []).append(run)
    return panels


def _settings(run: Run, axes: Sequence[Axis]) -> str:
    return ", ".join(f"{axis.column} {axis.value(run.config)}" for axis in axes)


def _share(panel: Axes, first: Axes) -> None:
    if panel is not first:
        panel.sharey(first)


def _legends(axes: Sequence[Axes]) -> None:
    """Legends in the first panel, and in those that have lines which no panel before them has."""
    told: set[str] = set()
    for panel in axes:
        names = set(panel.get_legend_handles_labels()[1])
        if not names <= told:
            panel.legend(loc="best")
        told |= names


def _title(identity: dict, runs: Sequence[Run]) -> str:
    settings = constants([run.config for run in runs])
    return (
        f"{identity['model']}, {', '.join(identity['texts'])}: {identity['tokens']} tokens, "
        f"prompt {identity['prompt_tokens']}; "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
    )


def _position_panel(panel: Axes, runs: Sequence[Run], full: Run, prompt_tokens: int, looks: dict) -> None:
    block = min(BLOCK, full.nll.shape[1])
    blocks = block_means(full.nll, block).shape[1]
    span = max(1, min(SPAN, blocks // 4))
    panel.axhline(0.0, color="0.6", linewidth=0.8)
    for run in runs:
        centres, mean, error = running_mean(run.nll - full.nll, span, block)
        x, (colour, line) = prompt_tokens + centres, looks[_name(run)]
        panel.plot(x, mean, line, color=colour, linewidth=1.6, label=_name(run))
        panel.fill_between(x, mean - error, mean + error, color=colour, alpha=0.12, linewidth=0)
    panel.set_xlim(prompt_tokens, prompt_tokens + full.nll.shape[1])
    panel.set_xlabel(f"position (tokens), mean of {span * block} tokens around it")


def _exposure_panel(panel: Axes, runs: Sequence[Run], looks: dict) -> None:
    """A line for all windows that differ in nothing else, from the widest of them; a point at each window."""
    varying = columns([run.config for run in runs])
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(", ".join(filter(None, [_any_window(run), _settings(run, varying)])), []).append(run)
    for (kind, chosen), style in zip(kinds.items(), itertools.cycle(DASHES)):
        widest = max(chosen, key=lambda run: run.config.slots).exposure
        panel.plot(widest, style, color="0.5", linewidth=1.2, zorder=1, label=kind)
        for run in chosen:
            colour = looks[_name(run)][0]
            panel.plot(len(run.exposure) - 1, run.exposure[-1], "o", color=colour, markersize=5)
    if len(kinds) > 1:
        panel.legend(loc="lower right")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("later decode steps")
    panel.set_ylabel("exposure (pages attended to / own step's)")
    panel.set_title("What a query has attended to in the end")


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style by name, the same in every panel."""
    others = [name for name in dict.fromkeys(names) if name != NAMES["quest"]]
    styles = {
        name: (COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)])
        for place, name in enumerate(others)
    }
    return {NAMES["quest"]: (QUEST_COLOUR, "-")} | styles


def _name(run: Run) -> str:
    config = run.config
    return label(config) if config.slots == 1 else f"{label(config)}, w = {config.slots}"


def _any_window(run: Run) -> str:
    """The name of a run of Quest or RetroAttention without its window."""
    return label(replace(run.config, method="retro"))
