"""The picture of a comparison."""

import itertools
from collections.abc import Sequence
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.estimates import BLOCK, block_means, running_mean
from experiments.results import Run, order
from experiments.tables import NAMES, label

QUEST_COLOUR = "#222222"
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours, told apart with every common kind of colour blindness; one per method and window;
with more of them, lines are dashed."""
SPAN = 8
"""Blocks in the running mean, fewer in a short text."""

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
    """Draws excess negative log-likelihood against position, a panel per number of sink pages, and exposure.

    Lines are running means over blocks of tokens, bands one standard error to each side.

    Args:
      identity: what the runs share, as `experiments.compare.identity` gives it.
      runs: full attention and at least one other.

    Returns:
      a PNG file.
    """
    full = next(run for run in runs if run.config.method == "full")
    others = [run for run in runs if run is not full and run.config.overwrite]
    sinks = sorted({run.config.sink_pages for run in others})
    looks = _looks(others)
    with mpl.rc_context(STYLE):
        width = 4.6 * len(sinks) + 3.8
        figure = Figure(figsize=(width, 3.7), layout="constrained")
        axes = figure.subplots(1, len(sinks) + 1, width_ratios=[4.6] * len(sinks) + [3.8])
        for panel, count in zip(axes, sinks, strict=False):
            panel.sharey(axes[0])
            chosen = [run for run in others if run.config.sink_pages == count]
            _excess_panel(panel, chosen, full, identity["prompt_tokens"], looks)
            panel.set_title(_sinks(count))
        axes[0].set_ylabel("excess NLL over full attention (nats per token)")
        axes[0].legend(loc="best")
        _exposure_panel(axes[-1], [run for run in others if run.config.attention.scored], looks)
        figure.suptitle(_title(identity), x=0.01, ha="left", fontsize=10)
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()


def _title(identity: dict) -> str:
    config = identity["config"]
    tokens = config["budget_tokens"]
    budget = f"{config['budget']:.0%} of the context" if tokens is None else f"{tokens} tokens"
    return (
        f"{identity['model']}, {', '.join(identity['texts'])}: {identity['tokens']} tokens, "
        f"prompt {identity['prompt_tokens']}, budget {budget} per step, pages of {config['page_size']}"
    )


def _excess_panel(panel: Axes, runs: Sequence[Run], full: Run, prompt_tokens: int, looks: dict) -> None:
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
    """A line per number of sink pages, score and eviction, from its widest window; a point at each window."""
    kinds = dict.fromkeys(map(_kind, runs))
    for kind, style in zip(kinds, itertools.cycle(("-", "--", ":", "-."))):
        chosen = [run for run in runs if _kind(run) == kind]
        widest = max(chosen, key=lambda run: run.config.slots).exposure
        panel.plot(widest, style, color="0.5", linewidth=1.2, zorder=1, label=kind)
        for run in chosen:
            colour = looks[_name(run)][0]
            panel.plot(len(run.exposure) - 1, run.exposure[-1], "o", color=colour, markersize=5)
    panel.legend(frameon=False, loc="lower right")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("later decode steps")
    panel.set_ylabel("exposure (pages attended to / own step's)")
    panel.set_title("What a query has attended to in the end")


def _looks(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Colour and line style by name, the same in every panel."""
    ordered = sorted(runs, key=lambda run: order(run.config)[1:])  # not by sink pages: each has its panel
    names = dict.fromkeys(_name(run) for run in ordered if _name(run) != NAMES["quest"])
    styles = {
        name: (COLOURS[place % len(COLOURS)], ("-", "--", ":", "-.")[place // len(COLOURS) % 4])
        for place, name in enumerate(names)
    }
    return {NAMES["quest"]: (QUEST_COLOUR, "-")} | styles


def _sinks(count: int) -> str:
    return f"{count} sink page{'' if count == 1 else 's'}"


def _kind(run: Run) -> str:
    config = run.config
    score = "" if config.score == "bounds" else config.score
    evict = "" if config.evict is None else f"{NAMES[config.evict]} evicts"
    return ", ".join(filter(None, [_sinks(config.sink_pages), score, evict]))


def _name(run: Run) -> str:
    return label(run) if run.config.slots == 1 else f"{label(run)}, w = {run.config.slots}"
