"""What a report shows: a run's results by method, with intervals and differences on the same examples."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from retro_jax import DecodeConfig
from retro_jax.experiments.io.budgets import budget_value
from retro_jax.experiments.io.estimates import Interval, block_means, bootstrap
from retro_jax.experiments.io.lines import read_lines
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.runs.folder import KEYS, read_identity, read_methods, read_results

FREE = ("methods", "presets", "windows", "budgets", "limit", "batch", "data_devices", "model_devices")
"""Fields of a run's configuration that change which results there are, and none of them."""


@dataclass(frozen=True)
class Measured:
    """A run, read from its folder, or from several that hold parts of it.

    Attributes:
      paths: of the folders.
      identity: the config.json of the first.
      configs: how each method decodes, by name.
      lines: results, each (example, method, sample) once.
      timings: of batches, each with the device of its folder's last start.
      starts: provenance of the last start of each folder; none for a folder that lost it.
      planned: replies that each method is to have, by name.
      whole: whether paths are told whole, as another run's have the same names.
    """

    paths: Sequence[Path]
    identity: Mapping
    configs: Mapping[str, DecodeConfig]
    lines: Sequence[dict]
    timings: Sequence[dict]
    starts: Sequence[Mapping]
    planned: Mapping[str, int]
    whole: bool = False

    @property
    def config(self) -> Mapping:
        """The run's configuration as JSON values."""
        return self.identity["config"]

    @property
    def title(self) -> str:
        """The run's name, and where it lies."""
        return f"{self.identity['name']} ({' + '.join(map(self.place, self.paths))})"

    def place(self, path: Path) -> str:
        """How one of its folders is called."""
        return str(path) if self.whole else path.name

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have results, in the order of the work."""
        return list(dict.fromkeys(line["method"] for line in self.lines))

    @property
    def missing(self) -> dict[str, tuple[int, int]]:
        """Replies that unfinished methods have, and those that they are to have."""
        have = Counter(line["method"] for line in self.lines)
        return {
            label: (have[label], planned) for label, planned in self.planned.items() if have[label] < planned
        }

    @property
    def is_likelihood(self) -> bool:
        """Whether passages were decoded along, so that there are likelihoods and no scores."""
        return "scores" not in self.lines[0]

    def plain(self, method: str) -> bool:
        """Whether a method has the settings that all methods of the run share but those of presets."""
        config, shared = self.configs[method], self.config["decode"].items()
        return config.attention.dense or all(getattr(config, key) == value for key, value in shared)

    def find(self, method: str, window: int | None = None, budget: float | None = None) -> str | None:
        """The name of a plain method that has results, by its window and budget; None if there is none."""
        for name in filter(self.plain, self.methods):
            config = self.configs[name]
            given = None if config.attention.dense else budget_value(config)
            if (config.method, config.window, given) == (method, window, budget):
                return name
        return None

    def by_example(self, method: str) -> dict[str, float]:
        """Each example's value, in their order: its score or mean NLL over positions and samples.

        Replies are kept in the order in which they were finished, on which no interval is to depend.
        """
        name = "nll" if self.is_likelihood else "scores"
        found: dict[str, list[float]] = {}
        for line in self.lines:
            if line["method"] == method and line[name]:
                # null, which is not finite, becomes NaN
                found.setdefault(line["example"], []).append(float(np.mean(np.array(line[name], float))))
        return {example: float(np.mean(values)) for example, values in sorted(found.items())}

    def matrix(self, method: str, name: str) -> Float[np.ndarray, "lines positions"]:
        """The scores or likelihoods of all replies by position, in the order of examples and samples."""
        lines = sorted(
            (line for line in self.lines if line["method"] == method and line.get(name)),
            key=lambda line: (line["example"], line["sample"]),
        )
        width = max((len(line[name]) for line in lines), default=0)
        rows = [[*line[name], *[np.nan] * (width - len(line[name]))] for line in lines]
        return np.array(rows, float).reshape(len(lines), width)

    def pairs(self, method: str, other: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`matrix` of two methods, over the replies that both have."""
        have = [
            {(line["example"], line["sample"]) for line in self.lines if line["method"] == label}
            for label in (method, other)
        ]
        shared = have[0] & have[1]
        kept = replace(
            self, lines=[line for line in self.lines if (line["example"], line["sample"]) in shared]
        )
        return kept.matrix(method, name), kept.matrix(other, name)

    def mean(self, method: str, name: str) -> float:
        """The mean of a number that each reply has, NaN if none does."""
        values = [
            line[name] for line in self.lines if line["method"] == method and line.get(name) is not None
        ]
        return float(np.mean(values)) if values else float("nan")

    def tokens_per_second(self, method: str) -> float | None:
        """Generated tokens per second where sequences came and went; None if they did not.

        None too if they did so on several devices, or in batches of several sizes.
        """
        timed = [timing for timing in self.timings if timing["method"] == method and timing.get("tokens")]
        if len({(timing["device"], timing["batch"]) for timing in timed}) != 1:
            return None
        return sum(timing["tokens"] for timing in timed) / sum(timing["seconds"] for timing in timed)

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
    methods = read_methods(path, identity)
    names = {label: run_name(config) for label, config in methods.items()}
    if unknown := [line["method"] for line in lines if line["method"] not in names]:
        raise ValueError(
            f"{path} has results of {unknown[0]!r}, which is no method of its run; were two folders mixed?"
        )
    lines = [line | {"method": names[line["method"]]} for line in lines]
    kind = "scores" if "scores" in lines[0] else "nll"
    if without := [line for line in lines if kind not in line]:
        which = ", ".join(str(without[0][key]) for key in KEYS)
        raise ValueError(f"{path}: the result for {which} has no {kind!r}; were two folders mixed?")
    starts = read_lines(sorted(path.glob("provenance-*.jsonl")), ("commit", "device", "versions"))[-1:]
    device = starts[0]["device"] if starts else "unknown device"
    timed = ("method", "batch", "context", "steps_per_second")
    timings = read_lines(sorted(path.glob("timings-*.jsonl")), timed)
    timings = [timing | {"method": names.get(timing["method"]), "device": device} for timing in timings]
    # as many replies as the fullest method has, if no start tells how many there are to be
    most = max(Counter(line["method"] for line in lines).values())
    replies = max((start["replies"] for start in starts if "replies" in start), default=most)
    configs = dict(zip(names.values(), methods.values(), strict=True))
    return Measured([path], identity, configs, lines, timings, starts, dict.fromkeys(configs, replies))


def read_runs(paths: Sequence[Path]) -> list[Measured]:
    """Reads folders of runs; those that differ only in what `FREE` names are one run.

    Raises:
      FileNotFoundError: see `read_run`.
      ValueError: see `read_run` and `merge`.
    """
    groups: dict[str, list[Measured]] = {}
    for run in map(read_run, paths):
        shared = {key: value for key, value in run.config.items() if key not in FREE}
        groups.setdefault(same_json([run.identity["name"], shared]), []).append(run)
    runs = [merge(group) for group in groups.values()]
    titles = Counter(run.title for run in runs)
    return [replace(run, whole=titles[run.title] > 1) for run in runs]


def merge(parts: Sequence[Measured]) -> Measured:
    """Joins parts of one run: every result once, those of earlier parts first.

    Raises:
      ValueError: two parts have different results for the same example, method and sample, or were made from
        different examples.
    """
    found: dict[tuple, tuple[dict, Path]] = {}
    for part in parts:
        (path,) = part.paths
        first = next(other for other in parts if other.config["limit"] == part.config["limit"])
        if first.identity["examples"] != part.identity["examples"]:
            raise ValueError(f"{first.paths[0]} and {path} have different examples; report them on two pages")
        for line in part.lines:
            result = {name: value for name, value in line.items() if name != "config"}  # its folder's digest
            key = tuple(result[name] for name in KEYS)
            known, where = found.setdefault(key, (result, path))
            if different := [name for name in known | result if known.get(name) != result.get(name)]:
                raise ValueError(
                    f"{where} and {path} have different results for {', '.join(map(str, key))} "
                    f"({', '.join(different)}); report them on two pages"
                )
    return Measured(
        paths=[path for part in parts for path in part.paths],
        identity=parts[0].identity,
        configs={name: config for part in parts for name, config in part.configs.items()},
        lines=[line for line, _ in found.values()],
        timings=[timing for part in parts for timing in part.timings],
        starts=[start for part in parts for start in part.starts],
        planned={
            label: max(part.planned.get(label, 0) for part in parts)
            for part in parts
            for label in part.planned
        },
    )


def paired(run: Measured, method: str, other: str) -> list[float]:
    """A method's values less another's, on the examples that both have."""
    ours, theirs = run.by_example(method), run.by_example(other)
    return [ours[name] - theirs[name] for name in sorted(ours.keys() & theirs.keys())]


def difference(run: Measured, method: str, other: str) -> Interval | None:
    """A method's value less another's on the examples that both have; None if there are none."""
    values = paired(run, method, other)
    return bootstrap(values) if values else None


def quest_of(run: Measured, method: str) -> str | None:
    """The name of Quest with the same budget, if the run has it and the method is another."""
    quest = run.find("quest", budget=budget_value(run.configs[method]))
    return None if quest == method or run.configs[method].attention.dense else quest


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
            "config": asdict(run.configs[method]),
            "examples": len(values),
            "value": vars(bootstrap(list(values.values()))) if values else None,
            "minus_full": _values(difference(run, method, "full")) if method != "full" else None,
            "minus_quest": _values(difference(run, method, quest)) if quest else None,
            "exposure": run.exposure(method),
            "kv_bytes": run.mean(method, "kv_bytes"),
            "tokens_per_second": run.tokens_per_second(method),
        }
    missing = {label: {"replies": have, "planned": planned} for label, (have, planned) in run.missing.items()}
    return {"name": run.identity["name"], "config": run.config, "methods": methods, "missing": missing}


def _values(interval: Interval | None) -> dict | None:
    return None if interval is None else vars(interval)


def same_json(value: object) -> str:
    """A JSON value as a key: equal values give equal texts."""
    return json.dumps(value, sort_keys=True)
