"""What all pictures share: style, colours and marks, and panels of lines or of stacked bars.

`retro_jax.experiments.pictures.files` makes files of panels.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from retro_jax.experiments.pictures.words import plain

FULL_COLOUR = "#888888"
QUEST_COLOUR = "#222222"
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours, told apart with every common kind of colour blindness."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""As many as have no divisor in common with the number of colours: 42 pairs before one comes again."""
DASHES = ("-", "--", ":", "-.")

MOST_INTERVALS = 8
"""Lines of a panel up to which intervals are drawn; more of them hide each other."""
FEW_POINTS = 12
"""Points of a line up to which each has a mark, and its interval is a bar; longer ones have bands."""
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Look:
    """How a line is told apart: by colour, dashes and marks together."""

    colour: str
    dash: str = "-"
    marker: str = "o"
    hollow: bool = False

    @property
    def drawn(self) -> dict:
        """For `Axes.plot`."""
        face = "white" if self.hollow else self.colour
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker, "markerfacecolor": face}


FULL, QUEST = Look(FULL_COLOUR, marker="s"), Look(QUEST_COLOUR)
LEVEL = Look(FULL_COLOUR, marker="")
"""Of a line that is one value: it has no points."""


def looks(names: Iterable[str], fixed: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """Returns a look for each name, all different: fixed ones, and the others in the order of the names."""
    names, fixed = list(dict.fromkeys(names)), fixed or {}
    found = {name: fixed[name] for name in names if name in fixed}
    others = [name for name in names if name not in fixed]
    for place, name in enumerate(others):
        found[name] = Look(
            COLOURS[place % len(COLOURS)],
            DASHES[place // len(COLOURS) % len(DASHES)],
            MARKERS[place % len(MARKERS)],
        )
    return found


def known_looks(configs: Mapping[str, Mapping]) -> dict[str, Look]:
    """Returns the looks of full attention and of Quest, each of the first name with that method.

    Args:
      configs: fields of `DecodeConfig` by name.
    """
    first = {config["method"]: name for name, config in reversed(configs.items())}
    return {first[method]: look for method, look in {"full": FULL, "quest": QUEST}.items() if method in first}


@dataclass(frozen=True)
class Line:
    """Points of one name, with intervals where they are known; values that are not finite are not drawn.

    Attributes:
      name: for the legend.
      look: how it is drawn.
      x: places of the points.
      y: values.
      low: lower ends of the intervals; None: there are none.
      high: upper ends.
    """

    name: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @property
    def points(self) -> np.ndarray:
        """x, y, low and high of the points that can be drawn, (4, points)."""
        none = np.full(len(self.x), np.nan)
        columns = [none if part is None else part for part in (self.x, self.y, self.low, self.high)]
        points = np.array([np.asarray(column, float) for column in columns])
        return points[:, np.isfinite(points[:2]).all(axis=0)]

    @property
    def has_intervals(self) -> bool:
        """Whether a point has one that can be seen."""
        _, _, low, high = self.points
        return bool((high > low).any())


@dataclass(frozen=True)
class Scale:
    """An axis of a panel.

    Attributes:
      label: what it shows, with its unit.
      log: logarithmic, unless a value is zero or below.
      at_values: ticks where values are, as for the few sizes that a setting can have.
      whole: ticks at whole numbers only.
      shown: values that are in view, whatever is drawn.
    """

    label: str
    log: bool = False
    at_values: bool = False
    whole: bool = False
    shown: Sequence[float] = ()


class Panel(Protocol):
    """A part of a picture."""

    title: str

    @property
    def points(self) -> int:
        """Values that are drawn."""

    @property
    def lost(self) -> int:
        """Values that are not finite."""

    @property
    def intervals(self) -> bool | None:
        """Whether intervals are drawn; None: there are none."""

    def handles(self) -> dict[str, Artist]:
        """What stands for each name in the legend."""

    def draw(self, axes: Axes) -> None:
        """Draws it; titles and labels of axes are wrapped later."""


@dataclass(frozen=True)
class Curves:
    """A panel of lines.

    Attributes:
      lines: what it shows.
      x: the horizontal axis.
      y: the vertical axis.
      title: above it.
      decorate: draws what else belongs there, such as a limit.
    """

    lines: Sequence[Line]
    x: Scale
    y: Scale
    title: str = ""
    decorate: Callable[[Axes], None] | None = None

    @property
    def points(self) -> int:
        """As `Panel`."""
        return sum(line.points.shape[1] for line in self.lines)

    @property
    def lost(self) -> int:
        """As `Panel`."""
        return sum(len(line.x) for line in self.lines) - self.points

    @property
    def intervals(self) -> bool | None:
        """As `Panel`."""
        if not any(line.has_intervals for line in self.lines):
            return None
        return len(self.lines) <= MOST_INTERVALS

    def handles(self) -> dict[str, Artist]:
        """As `Panel`."""
        return {
            line.name: Line2D([], [], markersize=5, linewidth=1.4, **line.look.drawn)
            for line in self.lines
            if line.points.size
        }

    def draw(self, axes: Axes) -> None:
        """As `Panel`; where all lines are points at one place, they stand side by side around it."""
        places = np.unique(np.concatenate([line.points[0] for line in self.lines]))
        for number, line in enumerate(self.lines):
            x, y, low, high = line.points
            if len(places) == 1:
                x = np.full(len(x), number - (len(self.lines) - 1) / 2)
            few = len(x) <= FEW_POINTS
            step = 1 if few else len(x) // 8
            # Marks of different lines stand at different places.
            every = (number * max(1, step // len(self.lines)) % step, step)
            axes.plot(
                x, y, linewidth=1.4, markersize=4.5, markevery=every, label=line.name, **line.look.drawn
            )
            if line.has_intervals and self.intervals and few:
                bars = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
                axes.errorbar(x, y, bars, fmt="none", color=line.look.colour, linewidth=1, capsize=2)
            elif line.has_intervals and self.intervals:
                axes.fill_between(x, low, high, color=line.look.colour, alpha=0.12, linewidth=0)
        if len(places) == 1:
            axes.set_xticks([0], [plain(places[0])])
            axes.set_xlabel(self.x.label)
            axes.set_xlim(-(reach := 1 + len(self.lines) / 2), reach)
        else:
            _scale(axes, axes.xaxis, self.x, places)
        _scale(axes, axes.yaxis, self.y, np.concatenate([line.points[1] for line in self.lines]))
        if self.decorate:
            self.decorate(axes)


@dataclass(frozen=True)
class Bars:
    """A panel of stacked bars.

    Attributes:
      names: of the bars.
      parts: heights by part, from below, one for each bar.
      y: the vertical axis.
      title: above it.
    """

    names: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    y: Scale
    title: str = ""
    intervals = None

    @property
    def points(self) -> int:
        """As `Panel`."""
        return int(sum(np.isfinite(heights).sum() for heights in self.parts.values()))

    @property
    def lost(self) -> int:
        """As `Panel`."""
        return sum(map(len, self.parts.values())) - self.points

    def handles(self) -> dict[str, Artist]:
        """As `Panel`."""
        colours = zip(self.parts.items(), itertools.cycle(COLOURS))
        return {name: Patch(color=colour) for (name, heights), colour in colours if any(heights)}

    def draw(self, axes: Axes) -> None:
        """As `Panel`."""
        bottom = np.zeros(len(self.names))
        for (name, heights), colour in zip(self.parts.items(), itertools.cycle(COLOURS)):
            finite = np.nan_to_num(np.asarray(heights, float), nan=0.0, posinf=0.0, neginf=0.0)
            axes.bar(range(len(self.names)), finite, bottom=bottom, color=colour, label=name)
            bottom = bottom + finite
        axes.set_xticks(range(len(self.names)), self.names, rotation=60, fontsize=7)
        axes.set_ylabel(self.y.label)


def _scale(axes: Axes, axis: Axis, scale: Scale, values: np.ndarray) -> None:
    """Label, scale and ticks of an axis that shows these finite values."""
    axis.set_label_text(scale.label)
    shown = np.concatenate([values, scale.shown])
    if scale.log and shown.min() > 0:
        axes.set(**{f"{axis.axis_name}scale": "log"})
        low, high = shown.min(), shown.max()
        if low == high:
            axes.set(**{f"{axis.axis_name}lim": (low / 1.5, high * 1.5)})
        if scale.at_values or low == high:
            axis.set_major_locator(FixedLocator(_apart(np.unique(values))))
        elif high < 8 * low:
            axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        else:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        return
    if scale.whole:
        axis.get_major_locator().set_params(integer=True)
    for value in scale.shown:
        line = axes.axhline if axis is axes.yaxis else axes.axvline
        line(value, color="0.6", linewidth=0.8, zorder=0)


def _apart(values: np.ndarray) -> list[float]:
    """Those of sorted values above zero whose labels do not touch on a logarithmic axis."""
    span = math.log(values[-1] / values[0])
    kept = [values[0]]
    for value in values[1:]:
        if math.log(value / kept[-1]) > 0.11 * span:
            kept.append(value)
    return kept
