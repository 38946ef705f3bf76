"""Leaderboards: methods by tasks, a block for each budget, of all runs of one model."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from retro_jax import DecodeConfig
from retro_jax.experiments.io.budgets import budget_value
from retro_jax.experiments.io.estimates import Interval, bootstrap
from retro_jax.experiments.io.settings import distinct_names
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.report.data import Measured
from retro_jax.experiments.tasks import TASKS

NOTE = (
    "By task, with its length in tokens where it has one, and the number of examples. Bold is the best of a "
    "block beside full attention; where intervals overlap, that decides nothing. *Mean*: of the columns with "
    "scores, each counting the same, as in the bytes of a step; both are told of methods that all columns "
    "have. Of unfinished runs, what is there."
)
NOT_IN_NAMES = ("budget", "budget_tokens", "prefill_chunk", "implementation")
"""Fields of a configuration that blocks tell, or that change the speed of a method alone."""


@dataclass(frozen=True)
class Column:
    """A task, or a part of one, as one run has measured it.

    Attributes:
      title: the task or its part, and what tells it from other columns.
      metric: what its values are.
      run: that measured it.
      part: of the task; None: all of it.
    """

    title: str
    metric: str
    run: Measured
    part: str | None = None

    def values(self, method: str | None) -> list[float]:
        """A method's values, one for each example; none where the run does not have it."""
        if method is None:
            return []
        parts = _parts(self.run)
        found = self.run.by_example(method)
        return [value for name, value in found.items() if self.part is None or parts[name] == self.part]

    def kv_bytes(self, method: str) -> float:
        """What a step of a method reads, the mean over its replies."""
        parts = _parts(self.run)
        lines = (line for line in self.run.lines if self.part is None or parts[line["example"]] == self.part)
        return replace(self.run, lines=list(lines)).mean(method, "kv_bytes")

    @property
    def examples(self) -> int:
        """How many examples the fullest method has."""
        return max(len(self.values(method)) for method in self.run.methods)


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes:
      method: its name without the budget.
      values: by column; None where there is none.
      counts: examples of each.
      best: by column, whether no other sparse method of its block is better.
      mean: over the columns with scores; None where one is missing, or there is one only.
      best_mean: whether no other sparse method of its block has a better one.
      kv_bytes: that a step reads, the mean over columns; None where one is missing.
    """

    method: str
    values: Sequence[Interval | None]
    counts: Sequence[int]
    best: Sequence[bool]
    mean: Interval | None
    best_mean: bool
    kv_bytes: float | None


@dataclass(frozen=True)
class Leaderboard:
    """All runs of a model.

    Attributes:
      model: its name.
      columns: tasks.
      blocks: rows by budget, full attention first; None is the budget where no method has one.
    """

    model: str
    columns: Sequence[Column]
    blocks: Mapping[float | None, Sequence[Row]]


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Attributes:
      value: by which rows are sorted.
      text: how it is written.
      note: of how many examples it is, where others have more.
      best: whether it is to stand out.
    """

    value: float
    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Block:
    """A block of a leaderboard as a table.

    Attributes:
      budget: as in `Leaderboard`.
      heads: of the columns after the first, each with what is said of it.
      rows: a method and its cells; None where there is no value.
    """

    budget: float | None
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def leaderboards(runs: Sequence[Measured]) -> list[Leaderboard]:
    """One for each model of which there is more than one column."""
    by_model: dict[str, list[Measured]] = {}
    for run in runs:
        by_model.setdefault(run.config["model"], []).append(run)
    found = [(model, _columns(of_model)) for model, of_model in by_model.items()]
    return [Leaderboard(model, columns, _blocks(columns)) for model, columns in found if len(columns) > 1]


def sections(boards: Sequence[Leaderboard]) -> list[str]:
    """Leaderboards as parts of a page; nothing if there is none."""
    parts = ["## Leaderboard", NOTE] if boards else []
    for board in boards:
        metrics = dict.fromkeys(column.metric for column in board.columns)
        parts.append(f"### {board.model}\n\nValues: {' or '.join(metrics)}.")
        parts += map(_markdown, block_tables(board))
    return parts


def block_tables(board: Leaderboard) -> Iterator[Block]:
    """The blocks of a leaderboard, as what is written in Markdown and on the page for a browser."""
    for budget, rows in board.blocks.items():
        means = any(row.mean for row in rows)
        heads = [(f"{column.title} (n = {column.examples})", column.metric) for column in board.columns]
        heads += [("mean", "of the columns with scores, each counting the same")] * means
        heads.append(
            (
                "KV MB/step",
                "keys, values and page statistics that a step reads for a sequence, the mean of the columns",
            )
        )
        yield Block(budget, heads, [(row.method, [*_cells(row, board.columns, means)]) for row in rows])


def leaderboard_values(boards: Sequence[Leaderboard]) -> list[dict]:
    """Leaderboards as JSON values."""
    return [
        {
            "model": board.model,
            "columns": [
                {"title": column.title, "metric": column.metric, "examples": column.examples}
                for column in board.columns
            ],
            "blocks": [
                {"budget": budget, "rows": [asdict(row) for row in rows]}
                for budget, rows in board.blocks.items()
            ],
        }
        for board in boards
    ]


def _parts(run: Measured) -> dict[str, str | None]:
    """The part of the task that each example belongs to."""
    return {line["example"]: line.get("part") for line in run.lines}


def _columns(runs: Sequence[Measured]) -> list[Column]:
    """The columns of one model's runs, in their order."""
    columns = []
    for run in runs:
        task, alike = run.config["task"], [other.config["task"] for other in runs]
        alike = [other for other in alike if other["name"] == task["name"]]
        # Which parts there are, and how many examples, the columns tell themselves.
        about = [str(task["length"])] if "length" in task else []
        about += [
            f"{key} {value}"
            for key, value in task.items()
            if key not in ("length", "count")
            and not isinstance(value, list)
            and any(other.get(key) != value for other in alike)
        ]
        metric = "NLL" if run.is_likelihood else TASKS[task["name"]].metric
        order = [name for value in task.values() if isinstance(value, list) for name in value]
        parts = dict.fromkeys(_parts(run).values())
        parts = [*(part for part in order if part in parts), *(part for part in parts if part not in order)]
        columns += [Column(", ".join([part or task["name"], *about]), metric, run, part) for part in parts]
    titles = Counter(column.title for column in columns)
    return [
        replace(column, title=f"{column.title}, {column.run.place(column.run.paths[0])}")
        if titles[column.title] > 1
        else column
        for column in columns
    ]


def _blocks(columns: Sequence[Column]) -> dict[float | None, list[Row]]:
    names = _names(columns)
    configs = list(names)
    sparse = [config for config in configs if not config.attention.dense]
    # Tokens before shares.
    budgets = sorted(set(map(budget_value, sparse)), key=lambda budget: (isinstance(budget, float), budget))
    dense = dict.fromkeys(names[config] for config in configs if config.attention.dense)
    blocks = {}
    for budget in budgets or [None]:
        here = dict.fromkeys(names[config] for config in sparse if budget_value(config) == budget)
        above, rows = (
            [row for name in of_kind if any((row := _row(name, budget, columns, names)).counts)]
            for of_kind in (dense, here)
        )
        blocks[budget] = [*above, *(_marked(row, rows, columns) for row in rows)]
    return blocks


def _names(columns: Sequence[Column]) -> dict[DecodeConfig, str]:
    """Methods' names without their budgets, by which rows of different runs are one."""
    configs = list(dict.fromkeys(config for column in columns for config in column.run.configs.values()))
    return dict(zip(configs, distinct_names(configs, told=NOT_IN_NAMES), strict=True))


def _row(
    name: str, budget: float | None, columns: Sequence[Column], names: Mapping[DecodeConfig, str]
) -> Row:
    labels = [_label(column.run, name, budget, names) for column in columns]
    found = [column.values(label) for column, label in zip(columns, labels, strict=True)]
    values = [bootstrap(values) if values else None for values in found]
    scored = [values for column, values in zip(columns, found, strict=True) if not column.run.is_likelihood]
    kv_bytes = None
    if all(labels):  # else a mean over some columns would stand beside one over others
        each = [column.kv_bytes(label) for column, label in zip(columns, labels, strict=True)]
        kv_bytes = float(np.mean(each))
    return Row(
        method=name,
        values=values,
        counts=list(map(len, found)),
        best=[False] * len(columns),
        mean=bootstrap(*scored) if len(scored) > 1 and all(scored) else None,
        best_mean=False,
        kv_bytes=kv_bytes,
    )


def _label(run: Measured, name: str, budget: float | None, names: Mapping[DecodeConfig, str]) -> str | None:
    """What a run calls a method at a budget; None if it has no results of it."""
    for label in run.methods:
        config = run.configs[label]
        if names[config] == name and (config.attention.dense or budget_value(config) == budget):
            return label
    return None


def _marked(row: Row, rows: Sequence[Row], columns: Sequence[Column]) -> Row:
    """A sparse row, with the columns told in which it is the best of the sparse `rows`."""
    best = []
    for place, column in enumerate(columns):
        means = [other.values[place].mean for other in rows if other.values[place] is not None]
        own = row.values[place]
        best.append(own is not None and own.mean == (min if column.run.is_likelihood else max)(means))
    highest = max((other.mean.mean for other in rows if other.mean), default=None)
    return replace(row, best=best, best_mean=row.mean is not None and row.mean.mean == highest)


def budget_words(budget: float) -> str:
    """A budget in words: up to 1 a share of the context, above it tokens."""
    return f"{budget:g} {'tokens' if budget > 1 else 'of the context'}"


def _cells(row: Row, columns: Sequence[Column], means: bool) -> Iterator[Cell | None]:
    """What a row has of each column, of the mean if there is one, and of bytes."""
    for column, value, count, best in zip(columns, row.values, row.counts, row.best, strict=True):
        yield value and Cell(value.mean, value.text(2), f" (of {count})" * (count < column.examples), best)
    if means:
        yield row.mean and Cell(row.mean.mean, row.mean.text(2), best=row.best_mean)
    yield None if row.kv_bytes is None else Cell(row.kv_bytes / 1e6, f"{row.kv_bytes / 1e6:.2f}")


def _markdown(block: Block) -> str:
    """A block with its heading; the best in bold."""

    def text(cell: Cell | None) -> str:
        return "" if cell is None else (f"**{cell.text}**" if cell.best else cell.text) + cell.note

    told = "" if block.budget is None else f"Budget {budget_words(block.budget)}:\n\n"
    header = ["method", *(name for name, _ in block.heads)]
    return told + markdown(header, [[method, *map(text, cells)] for method, cells in block.rows])
