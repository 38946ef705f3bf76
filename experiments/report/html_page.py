"""The report as a page for a browser: all runs in one table and in charts, chosen by settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from retro_jax.experiments.compare.pictures import EXCESS, EXPOSURE, LATER_STEPS
from retro_jax.experiments.io.estimates import Interval, bootstrap
from retro_jax.experiments.io.files import finite
from retro_jax.experiments.io.settings import AXES, columns, label, settings
from retro_jax.experiments.pictures.pages import (
    Cell,
    Chart,
    Column,
    Series,
    Setting,
    Table,
    fields_tables,
    make_page,
    provenance_tables,
)
from retro_jax.experiments.pictures.panels import Scale
from retro_jax.experiments.pictures.words import shortened
from retro_jax.experiments.report.data import Measured, run_values
from retro_jax.experiments.report.leaderboard import (
    Leaderboard,
    block_tables,
    budget_words,
    leaderboard_values,
    leaderboards,
)
from retro_jax.experiments.report.paper import PAPER_NOTE, paper_rows
from retro_jax.experiments.report.pictures import (
    CONTEXT,
    INTERVAL,
    POSITION,
    QUESTIONS,
    READ,
    SCORE,
    STEP_TIME,
    excess_curves,
    position_curves,
    questions_groups,
)
from retro_jax.experiments.tasks import TASKS

TOKENS = Scale("position (tokens)", whole=True)
NLL = Scale("NLL (nats per token)")
RANKED = "Where intervals overlap, their order decides nothing. Of unfinished runs, what is there."


def report_page(runs: Sequence[Measured]) -> bytes:
    """Makes the page of some runs; returns the contents of an .html file."""
    values, paper, boards = [run_values(run) for run in runs], paper_rows(runs), leaderboards(runs)
    missing = [
        f"{run.title} is unfinished: {method} has {have} of {planned} replies."
        for run in runs
        for method, (have, planned) in run.missing.items()
    ]
    about = [f"In brackets and as bars: {INTERVAL}. Differences are taken on the same examples.", *missing]
    charts = [
        _chart("Score by position", runs, _by_position, POSITION, SCORE),
        _chart("Excess by position", runs, _excess, TOKENS, EXCESS),
        _chart("Score by bytes read", [run for run in runs if not run.is_likelihood], _by_bytes, READ, SCORE),
        _chart("NLL by bytes read", [run for run in runs if run.is_likelihood], _by_bytes, READ, NLL),
        _questions(runs),
        _chart("Exposure", runs, _exposure, LATER_STEPS, EXPOSURE),
        _chart("Time of a step", runs, _latency, CONTEXT, STEP_TIME),
    ]
    configs = {
        f"{run.title}: {method}" if len(runs) > 1 else method: of_method["config"]
        for run, of_run in zip(runs, values, strict=True)
        for method, of_method in of_run["methods"].items()
    }
    tables = [
        _table(runs, values),
        *(table for board in boards for table in _leaderboard(board)),
        *([_paper_table(paper)] if paper else []),
        *fields_tables("Configuration of methods", configs),
        *fields_tables("Configuration of runs", {run.title: _flat(run.config) for run in runs}),
        *provenance_tables([start for run in runs for start in run.starts]),
    ]
    title = shortened(", ".join(run.title for run in runs), 120)
    results = {"runs": values, "paper": paper, "leaderboards": leaderboard_values(boards)}
    return make_page(title, about, charts, tables, finite(results))


def _chart(
    title: str,
    runs: Sequence[Measured],
    lines: Callable[[Measured], Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]],
    x: Scale,
    y: Scale,
) -> Chart:
    """A chart of what a function gives for each run: settings, places and intervals of lines."""
    found = [
        _series({"run": run.title} | told, places, intervals)
        for run in runs
        for told, places, intervals in lines(run)
    ]
    held: dict[str, Setting] = {axis.column: axis.default for axis in AXES if axis.column}
    about = f"Bars: {INTERVAL}." if any(np.isfinite(line.low).any() for line in found) else ""
    return Chart(title, found, x, y, panels=["run", "device", *held], held=held, about=about)


def _series(told: Mapping, places: Sequence[float], intervals: Sequence[Interval]) -> Series:
    mean, low, high = ([getattr(value, part) for value in intervals] for part in ("mean", "low", "high"))
    return Series(told, places, mean, low, high)


def _by_position(run: Measured) -> Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]:
    for method, (places, intervals) in position_curves(run).items():
        yield settings(run.configs[method]), places, intervals


def _excess(run: Measured) -> Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]:
    for method, (places, intervals) in excess_curves(run).items():
        yield settings(run.configs[method]), places, intervals


def _by_bytes(run: Measured) -> Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]:
    """A line for all methods that differ in their budget only."""
    found: dict[tuple, list[str]] = {}
    for method in run.methods:
        if run.by_example(method):
            told = {name: value for name, value in settings(run.configs[method]).items() if name != "budget"}
            found.setdefault(tuple(told.items()), []).append(method)
    for told, methods in found.items():
        values = [bootstrap(list(run.by_example(method).values())) for method in methods]
        yield dict(told), [run.mean(method, "kv_bytes") / 1e6 for method in methods], values


def _exposure(run: Measured) -> Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]:
    for method in run.methods:
        if len(values := run.exposure(method)) > 1:
            yield settings(run.configs[method]), range(len(values)), _points(values)


def _latency(run: Measured) -> Iterator[tuple[dict, Sequence[float], Sequence[Interval]]]:
    timed: dict[tuple, list[Mapping]] = {}
    for timing in run.timings:
        if timing["steps_per_second"] and timing["method"] in run.configs:
            key = timing["method"], timing["device"], timing["batch"]
            timed.setdefault(key, []).append(timing)
    for (method, device, batch), timings in timed.items():
        told = settings(run.configs[method]) | {"device": device, "batch": batch}
        yield (
            told,
            [timing["context"] for timing in timings],
            _points([1000 / timing["steps_per_second"] for timing in timings]),
        )


def _points(values: Sequence[float]) -> list[Interval]:
    """Values without intervals."""
    return [Interval(value, float("nan"), float("nan")) for value in values]


def _questions(runs: Sequence[Measured]) -> Chart:
    """Score against the number of questions in one prompt, over runs that differ in nothing else."""
    lines = []
    for group in questions_groups(runs):
        about = {"model": group[0].config["model"], "source": group[0].config["task"]["source"]}
        for method in dict.fromkeys(method for run in group for method in run.methods):
            having = [run for run in group if run.by_example(method)]
            intervals = [bootstrap(list(run.by_example(method).values())) for run in having]
            if having:
                told = settings(having[0].configs[method]) | about
                lines.append(_series(told, [run.config["task"]["n"] for run in having], intervals))
    panels = ["model", "source", "budget"]
    return Chart("Score by questions", lines, QUESTIONS, SCORE, panels=panels, about=f"Bars: {INTERVAL}.")


def _table(runs: Sequence[Measured], values: Sequence[Mapping]) -> Table:
    varying = columns([config for run in runs for config in run.configs.values()])
    several = len(runs) > 1
    timed = any(found["tokens_per_second"] for of_run in values for found in of_run["methods"].values())
    heads = [
        Column("name", "as in the results"),
        *([Column("run")] if several else []),
        Column("method"),
        Column("window"),
        *(Column(axis.column) for axis in varying),
        Column("examples"),
        Column("metric"),
        Column("value", "mean over examples"),
        Column("- full", "less full attention's"),
        Column("- Quest, same budget", "less that of Quest with the same budget"),
        Column("exposure", "pages that a query has attended to in the end over those of its own step"),
        Column("KV MB/step", "keys, values and page statistics that a step reads for a sequence"),
        *([Column("tokens/s", "generated where a reply that ended made room for the next")] if timed else []),
    ]
    body = []
    for run, of_run in zip(runs, values, strict=True):
        for method, found in of_run["methods"].items():
            config, exposure = run.configs[method], found["exposure"]
            dense = config.attention.dense
            body.append([
                method,
                *([run.title] if several else []),
                label(config),
                None if dense else config.slots,
                *(None if dense else axis.value(config) for axis in varying),
                found["examples"],
                TASKS[run.config["task"]["name"]].metric,
                _cell(found["value"]) or "not scored",
                _cell(found["minus_full"]),
                _cell(found["minus_quest"]),
                (exposure[-1], f"{exposure[-1]:.2f}") if exposure else None,
                (found["kv_bytes"] / 1e6, f"{found['kv_bytes'] / 1e6:.2f}"),
                *([(rate, f"{rate:.1f}") if (rate := found["tokens_per_second"]) else None] if timed else []),
            ])  # fmt: skip
    return Table("Methods", heads, body)


def _leaderboard(board: Leaderboard) -> Iterator[Table]:
    """The blocks of a leaderboard, a table each."""
    for block in block_tables(board):
        heads = [Column("method"), *(Column(*head) for head in block.heads)]
        body = [
            [method, *(cell and (cell.value, cell.text + cell.note) for cell in cells)]
            for method, cells in block.rows
        ]
        told = "" if block.budget is None else f", budget {budget_words(block.budget)}"
        yield Table(f"Leaderboard of {board.model}{told}", heads, body, RANKED)


def _paper_table(rows: Sequence[Mapping]) -> Table:
    names = ["model", "task", "method", "quantity"]
    body = [
        [*(row[name] for name in names), _cell(row["ours"], 2), row["paper"], row["where"]] for row in rows
    ]
    return Table("Beside the paper", list(map(Column, [*names, "ours", "paper", "where"])), body, PAPER_NOTE)


def _cell(value: Mapping | None, digits: int = 3) -> Cell:
    return None if value is None else (value["mean"], Interval(**value).text(digits))


def _flat(value: Mapping, prefix: str = "") -> dict:
    found = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return found
