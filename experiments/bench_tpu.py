"""`retro-jax bench tpu-static`: decode steps on TPUs, predicted on a machine without one."""

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments import tpu_compiler
from experiments.flags import Output
from experiments.kernel_report import rounded
from experiments.plots import STYLE
from experiments.progress import Progress
from experiments.provenance import provenance
from experiments.results import finite, write_bytes, write_json
from experiments.tables import markdown
from experiments.tpu_model import decode_step
from models.names import nearest
from models.presets import SIZES
from pallas_kernels.tpu import CHIPS
from retro_jax import DecodeConfig

PARTS = ("weights", "dense attention", "selection", "attention", "update")


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
    budget: float = 0.15
    """Share of the context that a step may load per layer and KV head."""
    devices: int = 4
    """Over which KV heads and weights are spread."""
    batch: int = 1
    """Sequences that are decoded together."""
    out: Path | None = None
    """Folder for table.md, results.json and steps.png; it must not exist."""

    def run(self) -> None:
        """Compiles what is needed, predicts, writes and prints the tables."""
        self._check()
        cases = [
            (CHIPS[chip], size, context, window)
            for chip in self.chips
            for size in self.page_sizes or (CHIPS[chip].page_size,)
            for context in self.contexts
            for window in (0, *sorted({1, *self.windows}))
        ]
        rows = []
        with Progress() as progress:
            for done, case in enumerate(cases, start=1):
                rows.append(self._row(*case))
                progress("decode steps", done, len(cases))
        values = {
            "model": self.model,
            "budget": self.budget,
            "devices": self.devices,
            "batch": self.batch,
            "rows": rows,
            "provenance": provenance(),
        }
        report = static_report(values)
        if self.out is not None:
            self.out.mkdir(parents=True)
            write_json(self.out / "results.json", values)
            write_bytes(self.out / "table.md", report.encode())
            write_bytes(self.out / "steps.png", static_figure(values))
        print(json.dumps(finite(values)) if self.json else report, end="\n" if self.json else "")

    def _check(self) -> None:
        if self.out is not None and self.out.exists():
            raise ValueError(f"{self.out} exists and is not overwritten; choose another --out")
        if not tpu_compiler.installed():
            raise ValueError(
                "the TPU compiler is not installed: pip install -r tests/pallas_kernels/tpu-compiler.txt"
            )
        for name, values, known in (("model", (self.model,), SIZES), ("chips", self.chips, CHIPS)):
            for value in values:
                if value not in known:
                    raise ValueError(
                        f"--{name} {value!r} is unknown{nearest(value, known)}; use {', '.join(known)}"
                    )
        if min(self.devices, self.batch, *self.windows, *self.contexts) < 1:
            raise ValueError("--devices, --batch, --windows and --contexts must be 1 or more")

    def _row(self, chip, page_size, context, window) -> dict:
        """A method's step; window 0 is full attention."""
        method = {0: "full", 1: "quest"}.get(window, "retro")
        config = DecodeConfig(method, window=window or None, budget=self.budget, page_size=page_size)
        parts = decode_step(SIZES[self.model], config, chip, context, self.devices, self.batch)
        return {
            "chip": chip.name,
            "page_size": page_size,
            "context": context,
            "method": f"retro w={window}" if window > 1 else method,
            "parts": [asdict(part) for part in parts],
            "seconds": sum(part.layers * part.time for part in parts),
        }


def _of(row: dict, name: str) -> dict | None:
    return next((part for part in row["parts"] if part["name"] == name), None)


def _milliseconds(row: dict, name: str) -> str:
    part = _of(row, name)
    return "" if part is None else rounded(1e3 * part["layers"] * part["time"])


def _binding(row: dict) -> str:
    """What most of the step's time is bound by."""
    seconds = {}
    for part in row["parts"]:
        seconds[part["binds"]] = seconds.get(part["binds"], 0.0) + part["layers"] * part["time"]
    return max(seconds, key=seconds.get)


def static_report(values: dict) -> str:
    """Returns the results as Markdown: the steps, and sparse attention against its bandwidth time.

    Args:
      values: as in results.json.
    """
    steps, kernels = [], []
    quest = {}
    for row in values["rows"]:
        place = row["chip"], row["page_size"], row["context"]
        if row["method"] == "quest":
            quest[place] = row
        times = [_milliseconds(row, name) for name in PARTS]
        steps.append([*map(str, place), row["method"], *times, rounded(1e3 * row["seconds"]), _binding(row)])
        part = _of(row, "attention")
        if part is not None:
            over_quest = part["time"] / _of(quest[place], "attention")["time"]
            kernels.append(
                [
                    *map(str, place),
                    row["method"],
                    f"{part['bytes'] / 1e6:.2f}",
                    str(part["bundles"]),
                    rounded(1e6 * part["memory"]),
                    rounded(1e6 * part["time"]),
                    f"{part['time'] / part['memory']:.2f}",
                    f"{over_quest:.3f}",
                    part["binds"],
                ]
            )
    where = ["chip", "page", "context", "method"]
    parts = [
        f"# Predicted decode steps, {values['model']}",
        f"bfloat16, budget {values['budget']}, batch {values['batch']}, devices that share "
        f"the KV heads: {values['devices']}. Milliseconds a step in all layers, a lower bound from bytes and "
        "compiled schedules: sums over devices, launches, stalls and small operations are not in it.",
        markdown([*where, *PARTS, "step", "bound by"], steps),
        "Attention of one sparse layer on one device: what it reads (MB), bundles that a TensorCore "
        "issues, the time of its bytes at the bandwidth of HBM, and the predicted time with the latency "
        "of the first copy (microseconds).",
        markdown(
            [*where, "MB", "bundles", "bytes us", "us", "us / bytes us", "/ Quest", "bound by"],
            kernels,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def static_figure(values: dict) -> bytes:
    """Draws the parts of every step, a panel per context and page size of a chip.

    Args:
      values: as in results.json.

    Returns:
      a PNG file.
    """
    contexts = list(dict.fromkeys(row["context"] for row in values["rows"]))
    chips = list(dict.fromkeys((row["chip"], row["page_size"]) for row in values["rows"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * len(chips) + 1, 2.6 * len(contexts) + 0.6), layout="constrained")
        grid = figure.subplots(len(contexts), len(chips), squeeze=False)
        colours = dict(zip(PARTS, mpl.colormaps["tab10"].colors, strict=False))
        for context, panels in zip(contexts, grid, strict=True):
            for (chip, page_size), panel in zip(chips, panels, strict=True):
                rows = [
                    row
                    for row in values["rows"]
                    if (row["chip"], row["page_size"], row["context"]) == (chip, page_size, context)
                ]
                bottoms = [0.0] * len(rows)
                for name in PARTS:
                    parts = [_of(row, name) for row in rows]
                    heights = [1e3 * part["layers"] * part["time"] if part else 0.0 for part in parts]
                    label = name if panel is grid[0, 0] else None
                    panel.bar(range(len(rows)), heights, bottom=bottoms, color=colours[name], label=label)
                    bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
                names = [row["method"].replace("retro ", "") for row in rows]
                panel.set_xticks(range(len(rows)), names, rotation=60, fontsize=7)
                panel.set_title(f"{chip}, pages of {page_size}, {context // 1024}k", fontsize=8)
            panels[0].set_ylabel("ms a step")
        figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize=8)
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=140)
    return stream.getvalue()
