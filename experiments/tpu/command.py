"""`retro-jax bench tpu-static`: decode steps on TPUs, predicted on a machine without one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pallas_kernels.tpu import CHIPS
from retro_jax import DecodeConfig, preset
from retro_jax.experiments.io.checks import check_least
from retro_jax.experiments.io.flags import Output
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.io.tables import markdown, rounded
from retro_jax.experiments.pictures.files import Layout, pictures
from retro_jax.experiments.pictures.panels import Bars, Scale
from retro_jax.experiments.pictures.words import counted
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.model import decode_step
from retro_jax.models.names import nearest
from retro_jax.models.presets import SIZES

PARTS = ("weights", "dense attention", "window attention", "selection", "attention", "update")


@dataclass(kw_only=True)
class BenchTpuStatic(Output):
    """Predict decode steps on TPUs from bytes and from the compiler's schedules. Needs libtpu, but no TPU.

    A lower bound: sums over devices, launches, stalls within a schedule and small operations are left out.
    """

    model: str = "llama3.1-8b"
    """Name of a size, such as "llama3.1-8b" or "qwen2.5-32b"."""
    chips: tuple[str, ...] = tuple(CHIPS)
    """Of v4, v5e, v5p, v6e and tpu7x."""
    contexts: tuple[int, ...] = (32768, 131072)
    """Tokens in the cache."""
    page_sizes: tuple[int, ...] | None = None
    """Tokens per page; None: what is recommended for each chip."""
    windows: tuple[int, ...] = (1, 2, 4, 8)
    """Of RetroAttention; 1 is Quest, which always runs, as does full attention."""
    presets: tuple[str, ...] = ()
    """Further rows by these, such as "mean-key", at the same page sizes and budget."""
    budget: float = 0.15
    """Share of the context that a step may load per layer and KV head."""
    cache_dtype: Literal["int8", "float8_e4m3fn"] | None = None
    """Of keys and values; None: bfloat16, as all else."""
    devices: int = 4
    """Over which KV heads and weights are spread."""
    batch: int = 1
    """Sequences that are decoded together."""
    out: Path | None = None
    """Folder for table.md, results.json and steps.png; it must not exist."""

    def run(self) -> None:
        """Compiles what is needed, predicts, writes and prints the tables."""
        check_new(self.out)
        self._check()
        cases = [
            (CHIPS[chip], size, context, name, config)
            for chip in self.chips
            for size in self.page_sizes or (CHIPS[chip].page_size,)
            for context in self.contexts
            for name, config in self._configs(size).items()
        ]
        rows = []
        with Progress() as progress:
            for done, case in enumerate(cases, start=1):
                rows.append(self._row(*case))
                progress("decode steps", done, len(cases))
        values = {
            "model": self.model,
            "budget": self.budget,
            "cache_dtype": self.cache_dtype,
            "devices": self.devices,
            "batch": self.batch,
            "rows": rows,
            "provenance": provenance(),
        }
        report = static_report(values)
        if self.out is not None:
            write_results(self.out, values, report, static_pictures(values))
        self.show(values, report)

    def _check(self) -> None:
        if not tpu_compiler.installed():
            raise ValueError(
                "the TPU compiler is not installed; it comes with JAX for TPUs: pip install 'jax[tpu]'"
            )
        for name, values, known in (("model", (self.model,), SIZES), ("chips", self.chips, CHIPS)):
            for value in values:
                if value not in known:
                    raise ValueError(
                        f"--{name} {value!r} is unknown{nearest(value, known)}; use {', '.join(known)}"
                    )
        sizes = {"devices": self.devices, "windows": self.windows, "contexts": self.contexts}
        check_least(batch=self.batch, **sizes)

    def _configs(self, page_size: int) -> dict[str, DecodeConfig]:
        """What is predicted, by the name of its row."""
        fields = {"budget": self.budget, "page_size": page_size, "cache_dtype": self.cache_dtype}
        windows = {
            f"retro w={window}": DecodeConfig("retro", window=window, **fields)
            for window in sorted(set(self.windows) - {1})
        }
        presets = {name: preset(name, **fields) for name in self.presets}
        full, quest = DecodeConfig("full", **fields), DecodeConfig("quest", window=1, **fields)
        return {"full": full, "quest": quest, **windows, **presets}

    def _row(self, chip, page_size, context, name, config) -> dict:
        """A method's step."""
        parts = decode_step(SIZES[self.model], config, chip, context, self.devices, self.batch)
        return {
            "chip": chip.name,
            "page_size": page_size,
            "context": context,
            "method": name,
            "config": asdict(config),
            "parts": [asdict(part) for part in parts],
            "seconds": sum(part.layers * part.time for part in parts),
        }


def _of(row: dict, name: str) -> dict | None:
    return next((part for part in row["parts"] if part["name"] == name), None)


def _parts(rows: Sequence[dict]) -> list[str]:
    """The names of the parts that any of the steps has."""
    found = {part["name"] for row in rows for part in row["parts"]}
    return [name for name in PARTS if name in found]


def _milliseconds(row: dict, name: str) -> float:
    """Of all layers, whose windows may be of several sizes; 0 where there are none."""
    return sum(1e3 * part["layers"] * part["time"] for part in row["parts"] if part["name"] == name)


def _binding(row: dict) -> str:
    """What most of the step's time is bound by."""
    seconds = {}
    for part in row["parts"]:
        seconds[part["binds"]] = seconds.get(part["binds"], 0.0) + part["layers"] * part["time"]
    return max(seconds, key=seconds.get)


def _cache(values: dict) -> str:
    return f", keys and values in {values['cache_dtype']}" if values.get("cache_dtype") else ""


_COSTS = ("MB", "bundles", "bytes us", "us", "us / bytes us")


def _costs(part: dict) -> list[str]:
    return [
        f"{part['bytes'] / 1e6:.2f}",
        str(part["bundles"]),
        rounded(1e6 * part["memory"]),
        rounded(1e6 * part["time"]),
        f"{part['time'] / part['memory']:.2f}",
    ]


def static_report(values: dict) -> str:
    """Returns the results as Markdown: the steps, and sparse attention against its bandwidth time.

    Args:
      values: as in results.json.
    """
    steps, kernels, selections = [], [], []
    quest, names = {}, _parts(values["rows"])
    for row in values["rows"]:
        place = row["chip"], row["page_size"], row["context"]
        if row["method"] == "quest":
            quest[place] = row
        times = [rounded(_milliseconds(row, name)) if _of(row, name) else "" for name in names]
        steps.append([*map(str, place), row["method"], *times, rounded(1e3 * row["seconds"]), _binding(row)])
        part = _of(row, "selection")
        if part is not None:
            selections.append([*map(str, place), row["method"], *_costs(part), part["binds"]])
        part = _of(row, "attention")
        if part is not None:
            over_quest = part["time"] / _of(quest[place], "attention")["time"]
            kernels.append(
                [
                    *map(str, place),
                    row["method"],
                    *_costs(part),
                    f"{over_quest:.3f}",
                    part["binds"],
                ]
            )
    where = ["chip", "page", "context", "method"]
    parts = [
        f"# Predicted decode steps, {values['model']}",
        f"bfloat16{_cache(values)}, budget {values['budget']}, batch {values['batch']}, devices that share "
        f"the KV heads: {values['devices']}. Milliseconds a step in all layers, a lower bound from bytes and "
        "compiled schedules: sums over devices, launches, stalls and small operations are not in it.",
        markdown([*where, *names, "step", "bound by"], steps),
        "Attention of one sparse layer on one device: what it reads (MB), bundles that a TensorCore "
        "issues, the time of its bytes at the bandwidth of HBM, and the predicted time with the latency "
        "of the first copy (microseconds).",
        markdown(
            [*where, *_COSTS, "/ Quest", "bound by"],
            kernels,
        ),
        "Selection of one sparse layer on one device, likewise; the choice waits for all scores.",
        markdown([*where, *_COSTS, "bound by"], selections),
    ]
    return "\n\n".join(parts) + "\n"


def static_pictures(values: dict) -> dict[str, bytes]:
    """Draws the parts of every step, a panel per context and page size of a chip.

    Args:
      values: as in results.json.

    Returns:
      PNG files by name.
    """
    chips = list(dict.fromkeys((row["chip"], row["page_size"]) for row in values["rows"]))
    panels, parts = [], _parts(values["rows"])
    for context in dict.fromkeys(row["context"] for row in values["rows"]):
        for chip, page_size in chips:
            place = chip, page_size, context
            rows = [row for row in values["rows"] if (row["chip"], row["page_size"], row["context"]) == place]
            names = [row["method"].removeprefix("retro ") for row in rows]
            heights = {name: [_milliseconds(row, name) for row in rows] for name in parts}
            title = f"{chip}, pages of {page_size}, {context / 1024:g}k tokens"
            panels.append(Bars(names, heights, Scale("ms a step"), title))
    notes = [
        f"n = {counted(len(values['rows']), 'step')}, none measured: lower bounds from bytes and schedules",
        f"bfloat16{_cache(values)}, budget {values['budget']}, batch {values['batch']}, devices "
        f"{values['devices']}",
        "w: window of RetroAttention",
    ]
    across = min(5, len(chips))
    layout = Layout(across, across * max(1, 10 // across), panel=(3.0, 2.8))
    title = f"{values['model']}: parts of a decode step, predicted"
    return pictures("steps", panels, title, notes, layout)
