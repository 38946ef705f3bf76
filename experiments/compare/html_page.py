"""The page of a comparison: what its table and pictures show, for every run and text, chosen by settings."""

from collections.abc import Mapping, Sequence

import numpy as np

from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.pictures import (
    ERROR,
    EXCESS,
    EXPOSURE,
    LATER_STEPS,
    SWEPT,
    any_window,
    running_excess,
    smoothed,
)
from retro_jax.experiments.io.estimates import UNTOLD, Estimate
from retro_jax.experiments.io.files import finite
from retro_jax.experiments.io.settings import AXES, columns, constants, label, settings
from retro_jax.experiments.io.tables import number
from retro_jax.experiments.pictures.pages import (
    Cell,
    Chart,
    Column,
    Series,
    Table,
    fields_tables,
    make_page,
    provenance_tables,
)
from retro_jax.experiments.pictures.panels import Scale
from retro_jax.experiments.pictures.words import counted

ALL_TEXTS = "all together"
MOST_POINTS = 200
"""Of a line against position; of longer ones every second, third, ... point is left out."""
BYTES = "bytes read"
SWEPT_HERE = SWEPT | {
    BYTES: (
        "MB of keys, values and page statistics that a step reads for a text",
        lambda run: run.kv_bytes / 1e6,
    ),
}


def comparison_page(values: Mapping, runs: Sequence[Run]) -> bytes:
    """Makes the page.

    Args:
      values: as `retro_jax.experiments.compare.comparison.summary` gives them; the page offers them too.
      runs: of which the values are.

    Returns:
      The contents of an .html file.
    """
    texts = {ALL_TEXTS: values["pooled"]} | (values["per_text"] if len(values["texts"]) > 1 else {})
    rows = {
        text: dict(zip((row["run"] for row in of_text), of_text, strict=True))
        for text, of_text in texts.items()
    }
    same = constants([run.config for run in runs]) | values["config"]
    told = ", ".join(f"{name} {value}" for name, value in same.items() if value is not None)
    prompt, names = values["prompt_tokens"], values["texts"]
    each = " of each" * (len(names) > 1)
    about = [
        f"{counted(len(runs), 'run')} over {counted(len(names), 'text')} ({', '.join(names)}): "
        f"{values['tokens']} tokens{each}, a prompt of {prompt}, then teacher-forced decoding. "
        f"Settings of all: {told}.",
        "Excess is negative log-likelihood (nats per token) over full attention's on the same tokens.",
    ]
    charts = [
        _against_position(values, runs, rows),
        *(_against(name, runs, rows) for name in SWEPT_HERE if _varies(name, runs)),
        _exposure(runs),
    ]
    tables = [
        _table(values, runs, rows),
        *fields_tables("Configuration", {run["name"]: run["config"] for run in values["runs"]}),
        *provenance_tables([run.provenance for run in runs]),
    ]
    return make_page(
        f"{values['model']} ({values['dtype']}), compared", about, charts, tables, finite(values)
    )


def _chart(title: str, lines: Sequence[Series], x: Scale, y: Scale, about: str) -> Chart:
    held = {axis.column: axis.default for axis in AXES if axis.column}
    first = {"text": ALL_TEXTS}
    return Chart(title, lines, x, y, panels=[*held, "window"], first=first, held=held, about=about)


def _settings(run: Run, text: str, without: str = "") -> dict:
    found = settings(run.config) | {"text": text}
    return {name: value for name, value in found.items() if name != without}


def _against_position(values: Mapping, runs: Sequence[Run], rows: Mapping) -> Chart:
    """All texts together as a running mean over blocks, each text by the bins of the table."""
    full, first = runs[0], values["prompt_tokens"]
    lines = []
    for run in runs[1:]:
        centres, mean, error = running_excess(run, full)
        thin = slice(None, None, -(-len(centres) // MOST_POINTS))
        x, mean, error = first + centres[thin], mean[thin], error[thin]
        lines.append(Series(_settings(run, ALL_TEXTS), x, mean, mean - error, mean + error))
    middles = [(start + end) / 2 for start, end in values["position_bins"]]
    for text, of_text in rows.items():
        if text != ALL_TEXTS:
            for run in runs[1:]:
                bins = of_text[run.name]["by_position"]
                lines.append(_estimates(_settings(run, text), middles, bins))
    means = f"Points are means of {counted(smoothed(full), 'token')}"
    means += ", of one text those of the table" * (len(rows) > 1)
    about = f"Bars and bands: {ERROR}. {means}."
    return _chart("Excess by position", lines, Scale("position (tokens)", whole=True), EXCESS, about)


def _varies(name: str, runs: Sequence[Run]) -> bool:
    sparse = [run.config for run in runs if not run.config.attention.dense]
    if name == "window":
        return len({config.slots for config in sparse if config.attention.scored}) > 1
    return len(sparse) > 1 if name == BYTES else name in [axis.column for axis in columns(sparse)]


def _against(name: str, runs: Sequence[Run], rows: Mapping) -> Chart:
    """Excess against a setting, or what a step reads: a line for runs of a text that differ in it only."""
    words, value = SWEPT_HERE[name]
    chosen = [run for run in runs if not run.config.attention.dense]
    without = "budget" if name == BYTES else name
    if name == "window":  # a line of RetroAttention begins with Quest, whose window is 1
        chosen = [run for run in chosen if run.config.attention.scored]
    found: dict[tuple, tuple[dict, list[Run]]] = {}
    for text in rows:
        for run in chosen:
            told = _settings(run, text, without)
            if name == "window":
                told["method"] = any_window(run)
            found.setdefault(tuple(told.items()), (told, []))[1].append(run)
    lines = []
    for told, of_line in found.values():
        of_line = sorted(of_line, key=value)
        excess = [rows[told["text"]][run.name]["excess"] for run in of_line]
        lines.append(_estimates(told, [value(run) for run in of_line], excess))
    scale = Scale(words, log=True, at_values=name != BYTES)
    return _chart(f"Excess by {name}", lines, scale, EXCESS, f"Bars: {ERROR}.")


def _exposure(runs: Sequence[Run]) -> Chart:
    lines = []
    for run in runs:
        if run.config.slots > 1:
            told = settings(run.config)
            lines.append(Series(told, range(len(run.exposure)), run.exposure))
    return _chart("Exposure", lines, LATER_STEPS, EXPOSURE, "")


def _estimates(told: Mapping, x: Sequence[float], values: Sequence[Mapping]) -> Series:
    """A line of means with one standard error to each side."""
    mean = np.array([value["mean"] for value in values], float)
    error = np.array([value["error"] for value in values], float)
    return Series(told, x, mean, mean - error, mean + error)


def _table(values: Mapping, runs: Sequence[Run], rows: Mapping) -> Table:
    varying = columns([run.config for run in runs])
    heads = [
        Column("run", "the name that its files have"),
        Column("text"),
        Column("method"),
        Column("window"),
        *(Column(axis.column) for axis in varying),
        Column("NLL", "negative log-likelihood, nats per token"),
        Column("excess NLL", "over full attention on the same tokens; ± is one standard error"),
        *(
            Column(f"{start}-{end - 1}", "excess in this range of positions")
            for start, end in values["position_bins"]
        ),
        Column("of Quest's", f"excess over that of Quest with the same settings. {UNTOLD}"),
        Column("exposure", "pages that a query has attended to in the end over those of its own step"),
        Column("KV MB/step", "keys, values and page statistics that a step reads for a text"),
        Column("seconds", "wall time of the run over all texts, compilation included"),
    ]
    body = []
    for text, of_text in rows.items():
        for run in runs:
            row, config = of_text[run.name], run.config
            dense, base = config.attention.dense, run is runs[0]
            body.append([
                run.name,
                text,
                label(config),
                None if dense else config.slots,
                *(None if dense else axis.value(config) for axis in varying),
                (row["nll"]["mean"], f"{row['nll']['mean']:.4f}"),
                None if base else _cell(row["excess"]),
                *(None if base else _cell(part) for part in row["by_position"]),
                None if row["ratio"] is None else _cell(row["ratio"], 3),
                None if dense else (float(run.exposure[-1]), f"{run.exposure[-1]:.2f}"),
                (run.kv_bytes / 1e6, f"{run.kv_bytes / 1e6:.2f}"),
                (run.seconds, f"{run.seconds:.1f}"),
            ])  # fmt: skip
    return Table("Runs", heads, body, choose=1)


def _cell(value: Mapping, digits: int = 4) -> Cell:
    return value["mean"], number(Estimate(value["mean"], value["error"]), digits)
