"""Pictures as PNG files: panels in rows, the legend beside them, what was measured and on how much below.

Panels without a finite value are left out, and a picture without a panel is not made. Titles and labels are
wrapped, so that all words are inside.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retro_jax.experiments.pictures.panels import MOST_INTERVALS, STYLE, Panel
from retro_jax.experiments.pictures.words import DPI, line_count, shortened, wrapped

NARROWEST = 6.0
"""Width of a picture in inches, at least, so that its title can be read."""
WORDS = 3.0
"""Width of a name in a legend in inches, at most; longer ones are wrapped."""
TITLE_SIZE, NOTE_SIZE = 10, 8


@dataclass(frozen=True)
class Layout:
    """How the panels of a picture lie.

    Attributes:
      across: panels in a row, at most.
      most: panels of a file, at most; further ones go into files of their own.
      panel: width and height of one with its labels, in inches.
      share_y: whether all have the same vertical axis.
    """

    across: int = 3
    most: int = 9
    panel: tuple[float, float] = (4.4, 3.3)
    share_y: bool = False


def pictures(
    stem: str,
    panels: Sequence[Panel],
    title: str,
    notes: Sequence[str],
    layout: Layout = Layout(),
    interval: str = "",
) -> dict[str, bytes]:
    """PNG files by name: `stem`.png, and `stem`-2.png and so on where there are too many panels for one.

    Args:
      stem: of the files' names.
      panels: those without a finite value are left out; without any, there is no file.
      title: what is shown.
      notes: sentences below the panels, without their stops: how much was measured, settings; "" is none.
      layout: of the panels.
      interval: what bars and bands show; it is said where they are drawn.
    """
    drawn = [panel for panel in panels if panel.points]
    notes = [*filter(None, notes), *_about_intervals(drawn, interval)]
    if lost := sum(panel.lost for panel in panels):
        notes.append(f"Values that are not finite and so not drawn: {lost}")
    files = {}
    parts = list(itertools.batched(drawn, layout.most))
    for number, part in enumerate(parts, 1):
        name = f"{stem}.png" if number == 1 else f"{stem}-{number}.png"
        of = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
        files[name] = _picture(part, title + of, ". ".join(notes) + ".", layout)
    return files


def _about_intervals(panels: Sequence[Panel], interval: str) -> list[str]:
    """What bars and bands are, and where they are left out."""
    found = {panel.intervals for panel in panels}
    words = f"Bars and bands: {interval}"
    hidden = f"panels of more than {MOST_INTERVALS} lines"
    match True in found, False in found:
        case True, True:
            return [f"{words}; none in {hidden}"]
        case True, False:
            return [words]
        case False, True:
            return [f"No intervals in {hidden}"]
        case _:
            return []


def _picture(panels: Sequence[Panel], title: str, note: str, layout: Layout) -> bytes:
    across = 2 if len(panels) == 4 and layout.across == 3 else min(len(panels), layout.across)
    down = -(-len(panels) // across)
    width, height = layout.panel
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        grid = figure.subplots(down, across, squeeze=False, sharey=layout.share_y)
        for spare in grid.ravel()[len(panels) :]:
            spare.remove()
        for place, (axes, panel) in enumerate(zip(grid.ravel(), panels, strict=False)):
            panel.draw(axes)
            axes.set_title(wrapped(panel.title, width - 0.8, 9))
            axes.set_xlabel(wrapped(axes.get_xlabel(), width - 0.8, 9))
            axes.set_ylabel(wrapped(axes.get_ylabel(), height - 0.6, 9))
            if layout.share_y:
                axes.tick_params(labelleft=True)
                if place % across:
                    axes.set_ylabel("")
        handles = {name: handle for panel in panels for name, handle in panel.handles().items()}
        beside, tall = _legend(figure, handles, down * height)
        total = max(across * width + beside, NARROWEST)
        above = wrapped(title, total - beside - 0.2, TITLE_SIZE)
        below = wrapped(note, total - 0.2, NOTE_SIZE)
        figure.suptitle(above, x=0.1 / total, ha="left", fontsize=TITLE_SIZE, parse_math=False)
        figure.supxlabel(below, x=0.1 / total, ha="left", fontsize=NOTE_SIZE, color="0.3", parse_math=False)
        words = line_count(above) * TITLE_SIZE + line_count(below) * NOTE_SIZE
        figure.set_size_inches(total, max(down * height, tall) + words * 1.3 / 72)
        for text in figure.findobj(mpl.text.Text):
            text.set_parse_math(False)
        stream = BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _legend(figure: Figure, handles: Mapping[str, Artist], height: float) -> tuple[float, float]:
    """Puts the legend to the right of the panels; returns its width and height in inches."""
    names = [wrapped(shortened(name, 90), WORDS, 8) for name in handles]
    rows = sum(map(line_count, names))
    columns = max(1, math.ceil(rows * 0.18 / max(height, 4.0)))
    legend = figure.legend(
        list(handles.values()), names, loc="outside right upper", ncols=columns, handlelength=3.2
    )
    box = legend.get_window_extent(figure.canvas.get_renderer())
    return box.width / figure.dpi + 0.1, box.height / figure.dpi + 0.2
