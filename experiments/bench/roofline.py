"""The picture of a benchmark of kernels: how near each comes to the device's read bandwidth."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import COLOURS, MARKERS, QUEST_COLOUR, Curves, Line, Look, Scale
from retro_jax.experiments.pictures.words import counted, shortened

TITLES = {
    "attention": "Attention over selected pages",
    "dense": "Attention over all pages",
    "select": "Selection of pages",
    "update": "Update of pages",
}
REFERENCE = "xla"
"""The implementation that is the definition; it has the colour that Quest has elsewhere."""
FAR = 4.0
"""A ceiling so many times above a panel's fastest is told below the panels and not drawn."""


def roofline_pictures(values: dict) -> dict[str, bytes]:
    """Draws bandwidth against the bytes that must move, a panel per operation, and the device's own.

    Colours tell implementations apart, marks windows; other libraries are hollow.

    Args:
      values: as in results.json.

    Returns:
      PNG files by name.
    """
    rows, dims = values["rows"], values["dimensions"]
    found = _looks(rows)
    size = Scale("bytes that must move (MB)", log=True)
    rate = Scale("bytes that must move / time (GB/s)", shown=(0.0,))
    panels = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        chosen = [row for row in rows if row["operation"] == operation]
        lines = []
        for name in dict.fromkeys(map(_name, chosen)):
            points = sorted((row for row in chosen if _name(row) == name), key=lambda row: row["bytes"])
            x, y = [row["bytes"] / 1e6 for row in points], [row["gb_per_s"] for row in points]
            lines.append(Line(name, found[name], x, y))
        fastest = max(row["gb_per_s"] for row in chosen)
        ceiling = partial(_ceiling, values["ceiling_gb_per_s"], fastest)
        panels.append(Curves(lines, size, rate, TITLES[operation], ceiling))
    cache = f" in {dims['cache_dtype']}" if dims.get("cache_dtype") else ""
    notes = [
        f"n = {counted(values['calls'], 'call')} of each, medians",
        f"{dims['dtype']}, {dims['kv_heads']} KV heads of {dims['group']} query heads, head_dim "
        f"{dims['head_dim']}, pages of {dims['page_size']}{cache}",
        f"Grey line: read bandwidth, {values['ceiling_gb_per_s']:.4g} GB/s, unless it is far above",
        "Hollow: other libraries" if any(row["baseline"] for row in rows) else "",
    ]
    title = f"{shortened(values['provenance']['device'])}: operations on pages beside the read bandwidth"
    return pictures("roofline", panels, title, notes, Layout(across=4, panel=(3.4, 3.6)))


def _ceiling(ceiling: float, fastest: float, axes: Axes) -> None:
    """Draws the device's read bandwidth as a line, unless it is far above."""
    if ceiling < FAR * fastest:
        axes.axhline(ceiling, color="0.4", linewidth=1.0, zorder=1)
        axes.dataLim.update_from_data_y([ceiling], ignore=False)  # a margin above it, as above points
        axes.autoscale_view()
    axes.grid(True, which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _looks(rows: Sequence[dict]) -> dict[str, Look]:
    ours = sorted(rows, key=lambda row: row["baseline"] is not None)
    kinds = [kind for kind in dict.fromkeys(map(_kind, ours)) if kind != REFERENCE]
    colours = {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}
    windows = sorted({row["window"] for row in rows if row["window"] is not None})
    found = {}
    for row in ours:
        place = 0 if row["window"] is None else 1 + windows.index(row["window"])
        marker = MARKERS[place % len(MARKERS)]
        dash = "-" if place < len(MARKERS) else "--"
        hollow = row["baseline"] is not None
        found[_name(row)] = Look(colours.get(_kind(row), QUEST_COLOUR), dash, marker, hollow)
    return found


def _kind(row: dict) -> str:
    """What has a colour: an implementation of this library, or another library whichever its variant."""
    return row["baseline"] or row["implementation"]


def _name(row: dict) -> str:
    return _kind(row) if row["window"] is None else f"{_kind(row)}, w = {row['window']}"
