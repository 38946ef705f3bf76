"""Pages to look at: each one HTML file by itself, with charts that zoom, tables that sort, and the results.

A page fetches nothing: its script and style lie in `web/` (charts are drawn by uPlot, 51 kB, MIT) and are
written into it, and its policy forbids everything else. A chart holds lines that have *settings*; on the page
one chooses which setting gives colours, which gives panels, and at which values of the others one looks. So
one page shows a sweep of any size.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import jinja2

from retro_jax.experiments.pictures.panels import COLOURS, FEW_POINTS, MOST_INTERVALS, Scale

WEB = Path(__file__).with_name("web")
SCRIPTS = ("uPlot.iife.min.js", "elements.js", "charts.js", "tables.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")
FIXED = {"full": "--full", "Quest": "--ink"}
"""Names that have the same colour on every page, as in pictures: variables of `page.css`."""
DIGITS = 6
"""Of the numbers of lines; the results have all of theirs."""

Setting = str | float | int
Cell = str | float | int | None | tuple[float | None, str]
"""Of a table; a pair is what rows are sorted by, and how it is written."""


@dataclass(frozen=True)
class Series:
    """A line of a chart; points that are not finite are not drawn.

    Attributes:
      settings: what was measured here, by the names of settings; one that it does not have, as full attention
        no budget, is left out, and it is shown at every value of it.
      x: places of the points.
      y: values.
      low: lower ends of the intervals; None: there are none.
      high: upper ends.
    """

    settings: Mapping[str, Setting]
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Chart:
    """Lines of one quantity against another.

    Attributes:
      title: of the button that shows it.
      lines: at least one with a point, or the chart is left out.
      x: the horizontal axis.
      y: the vertical axis.
      colour: settings that give colours, unless others are chosen.
      panels: settings that may give panels, until others are chosen: the first of them that varies does.
      first: values that are shown, until others are chosen, of settings that give neither.
      held: values that are shown of further settings where lines would be too many; those that have none here
        are held at their first value.
      about: what intervals are, and whatever else has to be known.
    """

    title: str
    lines: Sequence[Series]
    x: Scale
    y: Scale
    colour: Sequence[str] = ("method", "window")
    panels: Sequence[str] = ()
    first: Mapping[str, Setting] = field(default_factory=dict)
    held: Mapping[str, Setting] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and what is said where one points at it."""

    name: str
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
      title: above it.
      columns: of every row.
      rows: cells.
      about: below the title.
      choose: the column of which one value is shown at a time, the first row's at first; None: all are.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    about: str = ""
    choose: int | None = None


def make_page(
    title: str, about: Sequence[str], charts: Sequence[Chart], tables: Sequence[Table], results: Mapping
) -> bytes:
    """Returns a page as the contents of an .html file.

    Args:
      title: above everything.
      about: paragraphs below it, plain text.
      charts: those without a finite value are left out.
      tables: in their order.
      results: JSON values that the page offers as a file, without numbers that are not finite.

    Raises:
      ValueError: `results` has numbers that are not finite, or a row another number of cells than its table
        has columns.
    """
    shown = {
        "colours": COLOURS,
        "fixed": FIXED,
        "few_points": FEW_POINTS,
        "most_intervals": MOST_INTERVALS,
        "charts": [chart for chart in map(_chart, charts) if chart["lines"]],
        "tables": [_table(table) for table in tables],
    }
    script, style = _source(SCRIPTS), _source(STYLES)
    policy = f"default-src 'none'; script-src {_allowed(script)}; style-src {_allowed(style)}"
    page = _template().render(
        title=title,
        about=about,
        policy=policy,
        script=script,
        style=style,
        results=_json(results),
        shown=_json(shown),
    )
    return page.encode()


def table_page(title: str, about: Sequence[str], tables: Sequence[Table], results: Mapping) -> bytes:
    """Returns a page of tables alone; see `make_page`."""
    return make_page(title, about, [], tables, results)


def fields_tables(title: str, configs: Mapping[str, Mapping]) -> list[Table]:
    """Returns configurations, by name, as tables: the fields in which they differ, and what all share."""
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    values = {name: [_written(config.get(name)) for config in configs.values()] for name in names}
    varying = [name for name in names if len(set(values[name])) > 1]
    rows = [[run, *(values[name][place] for name in varying)] for place, run in enumerate(configs)]
    found = [Table(title, [Column(""), *map(Column, varying)], rows)] if varying else []
    same = [[name, values[name][0]] for name in names if name not in varying]
    shared = f"{title}: the same in all" if len(configs) > 1 else title
    return [*found, Table(shared, [Column("field"), Column("value")], same)]


def provenance_tables(starts: Sequence[Mapping]) -> list[Table]:
    """Returns where results come from, as tables: what differs beside the dates, and what all share.

    Args:
      starts: as `retro_jax.experiments.io.provenance.provenance` gives them.
    """
    dates: dict[str, list[str]] = {}
    found: dict[str, Mapping] = {}
    for start in starts:
        flat = {key: value for key, value in start.items() if key not in ("versions", "date")}
        flat |= start.get("versions", {})
        code = json.dumps(flat, sort_keys=True)
        found[code] = flat
        dates.setdefault(code, []).append(str(start.get("date", "")))
    told = {
        code: {"first date": min(of), "last date": max(of), "times": len(of)} for code, of in dates.items()
    }
    named = {str(place): told[code] | flat for place, (code, flat) in enumerate(found.items(), 1)}
    return fields_tables("Where it was computed", named)


def _chart(chart: Chart) -> dict:
    """A chart as JSON values: lines name their settings by places in lists."""
    settings = list(dict.fromkeys(name for line in chart.lines for name in line.settings))
    values = [
        list(dict.fromkeys(line.settings[name] for line in chart.lines if name in line.settings))
        for name in settings
    ]
    lines = []
    for line in chart.lines:
        places = [
            values[place].index(line.settings[name]) if name in line.settings else None
            for place, name in enumerate(settings)
        ]
        if points := _points(line):
            lines.append({"settings": places} | points)
    named = ("title", "colour", "panels", "first", "held", "about")
    axes = {"x": asdict(chart.x), "y": asdict(chart.y)}
    own = {name: getattr(chart, name) for name in named}
    return own | axes | {"settings": settings, "values": values, "lines": lines}


def _points(line: Series) -> dict:
    """The points of a line that can be drawn, in the order of x; empty if there are none."""
    none = [math.nan] * len(line.x)
    ends = [none if values is None else values for values in (line.low, line.high)]
    columns = zip(line.x, line.y, *ends, strict=True)
    points = [[_rounded(value) for value in point] for point in columns]
    points = sorted((point for point in points if None not in point[:2]), key=lambda point: point[0])
    if not points:
        return {}
    x, y, low, high = map(list, zip(*points, strict=True))
    intervals = any(None not in pair and pair[1] > pair[0] for pair in zip(low, high, strict=True))
    return {"x": x, "y": y} | ({"low": low, "high": high} if intervals else {})


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _table(table: Table) -> dict:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"{table.title}: a row has {len(row)} cells for {len(table.columns)} columns")
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return asdict(table) | {"rows": rows}


def _cell(cell: Cell) -> str | float | int | list | None:
    if isinstance(cell, tuple):
        value, text = cell
        return [None if value is None or not math.isfinite(value) else value, text]
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _written(value: object) -> str:
    """A value of a field as it is written in Python, a text without its quotes."""
    return str(value)


def _json(value: object) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _source(files: tuple[str, ...]) -> str:
    """Scripts or styles in one, with the licence of uPlot before them."""
    licence = (WEB / "uPlot.LICENSE").read_text().strip()
    parts = [(WEB / name).read_text() for name in files]
    return "\n".join([f"/* uPlot:\n{licence}\n*/", *parts])


def _allowed(source: str) -> str:
    """A source in the policy of a page, by its digest."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string((WEB / "page.html").read_text())
