"""The picture of a benchmark of kernels: how near each comes to the device's read bandwidth."""

from collections.abc import Sequence
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.plots import COLOURS, QUEST_COLOUR, STYLE

TITLES = {
    "attention": "Attention over selected pages",
    "dense": "Attention over all pages",
    "select": "Selection of pages",
    "update": "Update of pages",
}
REFERENCE = "xla"
"""The implementation that is the definition; it has the colour that Quest has elsewhere."""
WINDOW_MARKERS = ("o", "s", "^", "v", "P", "X")
BASELINE_MARKER = "D"
FAR = 4.0
"""A ceiling so many times above a panel's fastest is written down rather than drawn."""


def roofline_figure(values: dict) -> bytes:
    """Draws bandwidth against the bytes that must move, a panel per operation, and the device's own.

    Colours tell implementations apart, markers windows; other libraries are hollow.

    Args:
      values: as in results.json.

    Returns:
      a PNG file.
    """
    rows, dims = values["rows"], values["dimensions"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    colours = _colours(rows)
    windows = sorted({row["window"] for row in rows if row["window"] is not None})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(operations) + 1.7, 3.9), layout="constrained")
        for panel, operation in zip(
            figure.subplots(1, len(operations), squeeze=False)[0], operations, strict=True
        ):
            chosen = [row for row in rows if row["operation"] == operation]
            _panel(panel, chosen, values["ceiling_gb_per_s"], colours, windows)
            panel.set_title(TITLES[operation])
        figure.axes[0].set_ylabel("bytes that must move / time (GB/s)")
        figure.legend(handles=_legend(rows, colours, windows), loc="outside right center")
        title = (
            f"{values['provenance']['device']}: {dims['dtype']}, {dims['kv_heads']} KV heads of "
            f"{dims['group']} query heads, head_dim {dims['head_dim']}, pages of {dims['page_size']}"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()


def _panel(panel: Axes, rows: Sequence[dict], ceiling: float, colours: dict, windows: Sequence[int]) -> None:
    series: dict[tuple[str, int | None], list[dict]] = {}
    for row in rows:
        series.setdefault((_name(row), row["window"]), []).append(row)
    for number, ((name, window), points) in enumerate(series.items()):
        colour, hollow = colours[name], points[0]["baseline"] is not None
        # Series of the same sizes lie side by side.
        shift = 1.03 ** (number - (len(series) - 1) / 2)
        points = sorted(points, key=lambda row: row["bytes"])
        panel.plot(
            [row["bytes"] / 1e6 * shift for row in points],
            [row["gb_per_s"] for row in points],
            marker=_marker(hollow, window, windows),
            color=colour,
            linewidth=0.7,
            markersize=5.5,
            markeredgewidth=1.2,
            markerfacecolor="white" if hollow else colour,
        )
    fastest = max(row["gb_per_s"] for row in rows)
    note = f"read bandwidth {ceiling:.4g} GB/s"
    if ceiling < FAR * fastest:
        panel.axhline(ceiling, color="0.4", linewidth=1.0, zorder=1)
        panel.set_ylim(0, 1.1 * max(ceiling, fastest))
        place = {"xytext": (0, 3), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        panel.annotate(note, (0.02, ceiling), fontsize=7.5, **place)
    else:
        panel.set_ylim(0, 1.2 * fastest)
        panel.text(0.02, 0.98, f"{note}, far above", transform=panel.transAxes, va="top", fontsize=7.5)
    _size_axis(panel, [row["bytes"] / 1e6 for row in rows])
    panel.grid(True, which="major", color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)


def _size_axis(panel: Axes, sizes: Sequence[float]) -> None:
    panel.set_xscale("log")
    low, high = min(sizes), max(sizes)
    panel.set_xlim(low / 1.7, high * 1.7)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("bytes that must move (MB)")


def _colours(rows: Sequence[dict]) -> dict[str, str]:
    names = dict.fromkeys(_name(row) for row in sorted(rows, key=lambda row: row["baseline"] is not None))
    others = [name for name in names if name != REFERENCE]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    return {name: colours.get(name, QUEST_COLOUR) for name in names}


def _legend(rows: Sequence[dict], colours: dict, windows: Sequence[int]) -> list[Line2D]:
    libraries = {row["baseline"] for row in rows}

    def handle(marker: str, colour: str, name: str, hollow: bool = False) -> Line2D:
        face = "white" if hollow else colour
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=colour,
            markerfacecolor=face,
            label=name,
            markersize=5.5,
        )

    handles = [
        handle(BASELINE_MARKER if name in libraries else "o", colour, name, name in libraries)
        for name, colour in colours.items()
    ]
    return handles + [handle(_marker(False, window, windows), "0.6", f"w = {window}") for window in windows]


def _marker(hollow: bool, window: int | None, windows: Sequence[int]) -> str:
    if hollow:
        return BASELINE_MARKER
    return "o" if window is None else WINDOW_MARKERS[windows.index(window) % len(WINDOW_MARKERS)]


def _name(row: dict) -> str:
    """What has a colour: an implementation of this library, or another library whichever its variant."""
    return row["baseline"] or row["implementation"]
