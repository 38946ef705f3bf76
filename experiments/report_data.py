"""What a report shows: a run's results by method, with intervals and differences on the same examples."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.estimates import block_means
from experiments.run_folder import read_identity, read_lines, read_results

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; NaN for the ends where there are fewer than two values to resample."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """The mean and the interval in brackets."""
        if np.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Measured:
    """A run's folder, read.

    Attributes:
      path: of the folder.
      identity: its config.json.
      lines: its results.
      timings: of its batches.
      provenance: of its last start, empty if it was lost.
    """

    path: Path
    identity: Mapping
    lines: Sequence[dict]
    timings: Sequence[dict]
    provenance: Mapping

    @property
    def config(self) -> Mapping:
        """The run's configuration as JSON values."""
        return self.identity["config"]

    @property
    def title(self) -> str:
        """The run's name, and where it lies."""
        return f"{self.identity['name']} ({self.path.name})"

    @property
    def methods(self) -> list[str]:
        """Labels of the methods that have results, in the order of the work."""
        return list(dict.fromkeys(line["method"] for line in self.lines))

    @property
    def is_likelihood(self) -> bool:
        """Whether passages were decoded along, so that there are likelihoods and no scores."""
        return "scores" not in self.lines[0]

    def by_example(self, method: str) -> dict[str, float]:
        """Each example's value: its score, or its mean NLL; the mean over positions and samples."""
        name = "nll" if self.is_likelihood else "scores"
        found: dict[str, list[float]] = {}
        for line in self.lines:
            if line["method"] == method and line[name]:
                found.setdefault(line["example"], []).append(float(np.mean(line[name])))
        return {example: float(np.mean(values)) for example, values in found.items()}

    def matrix(self, method: str, name: str) -> Float[np.ndarray, "lines positions"]:
        """The scores or likelihoods of all replies by position, in the order of examples and samples."""
        lines = sorted(
            (line for line in self.lines if line["method"] == method and line.get(name)),
            key=lambda line: (line["example"], line["sample"]),
        )
        width = max((len(line[name]) for line in lines), default=0)
        return np.array([[*line[name], *[np.nan] * (width - len(line[name]))] for line in lines], float)

    def pairs(self, method: str, other: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`matrix` of two methods, over the replies that both have."""
        have = [
            {(line["example"], line["sample"]) for line in self.lines if line["method"] == label}
            for label in (method, other)
        ]
        shared = have[0] & have[1]
        kept = Measured(
            self.path,
            self.identity,
            [line for line in self.lines if (line["example"], line["sample"]) in shared],
            self.timings,
            self.provenance,
        )
        return kept.matrix(method, name), kept.matrix(other, name)

    def mean(self, method: str, name: str) -> float:
        """The mean of a number that each reply has, NaN if none does."""
        values = [
            line[name] for line in self.lines if line["method"] == method and line.get(name) is not None
        ]
        return float(np.mean(values)) if values else float("nan")

    def exposure(self, method: str) -> list[float]:
        """Mean exposure after 0, 1, ... later steps; empty for full attention."""
        found = [line["exposure"] for line in self.lines if line["method"] == method and line.get("exposure")]
        found = [values for values in found if None not in values]
        return np.mean(found, axis=0).tolist() if found else []


def read_run(path: Path) -> Measured:
    """Reads a run's folder.

    Raises:
      FileNotFoundError: the folder is not there or holds no run.
      ValueError: it has no results yet, or they are damaged.
    """
    identity, lines = read_identity(path), read_results(path)
    if not lines:
        raise ValueError(f"{path} has no results yet")
    starts = read_lines(sorted(path.glob("provenance-*.jsonl")))
    return Measured(
        path=path,
        identity=identity,
        lines=lines,
        timings=read_lines(sorted(path.glob("timings-*.jsonl"))),
        provenance=starts[-1] if starts else {},
    )


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean and its 95% bootstrap interval (percentiles) over values, one for each example."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def difference(run: Measured, method: str, other: str) -> Interval | None:
    """A method's value less another's on the examples that both have; None if there are none."""
    ours, theirs = run.by_example(method), run.by_example(other)
    shared = sorted(ours.keys() & theirs.keys())
    return bootstrap([ours[name] - theirs[name] for name in shared]) if shared else None


def quest_of(run: Measured, method: str) -> str | None:
    """The label of Quest with the same budget, if the run has it and the method is another."""
    label = f"quest-{method.rpartition('-')[2]}"
    return label if method != "full" and label != method and label in run.methods else None


def by_bins(values: Float[np.ndarray, "lines positions"], bins: int) -> tuple[np.ndarray, list[Interval]]:
    """Centres (positions from 1) and intervals of the mean over replies in about `bins` ranges of positions.

    Replies that do not reach the end of a range (NaN) are left out of it.
    """
    edges = np.unique(np.linspace(0, values.shape[1], min(bins, values.shape[1]) + 1).astype(int))
    parts = [values[:, start:end].mean(axis=1) for start, end in itertools.pairwise(edges)]
    return (edges[:-1] + edges[1:] + 1) / 2, [bootstrap(part[~np.isnan(part)]) for part in parts]


def excess_by_position(
    run: Measured, method: str, block: int
) -> tuple[Float[np.ndarray, " blocks"], list[Interval]] | None:
    """Centres and intervals over passages of NLL over full attention's, in blocks of tokens."""
    ours, full = run.pairs(method, "full", "nll")
    if not ours.size or ours.shape[1] < block:
        return None
    means = block_means(ours - full, block)
    centres = (np.arange(means.shape[1]) + 0.5) * block + run.config["task"]["prompt_tokens"]
    return centres, [bootstrap(column) for column in means.T]


def run_values(run: Measured) -> dict:
    """What a report says of a run, as JSON values."""
    methods = {}
    for method in run.methods:
        values = run.by_example(method)
        quest = quest_of(run, method)
        methods[method] = {
            "examples": len(values),
            "value": vars(bootstrap(list(values.values()))) if values else None,
            "minus_full": _values(difference(run, method, "full")) if method != "full" else None,
            "minus_quest": _values(difference(run, method, quest)) if quest else None,
            "exposure": run.exposure(method),
            "kv_bytes": run.mean(method, "kv_bytes"),
        }
    return {"name": run.identity["name"], "config": run.config, "methods": methods}


def _values(interval: Interval | None) -> dict | None:
    return None if interval is None else vars(interval)


def same_json(value: object) -> str:
    """A JSON value as a key: equal values give equal texts."""
    return json.dumps(value, sort_keys=True)
