"""Speed of the operations on pages, each by itself: device time, beside what its bytes must take at least.

The ceiling is the read bandwidth of the same device in the same run. Every implementation that was asked for
is timed on the same inputs, then attention of other libraries over as many keys and values.
"""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from traceback import print_exc
from typing import Literal

import jax

from pallas_kernels import GROUP_REDUCE, IMPLEMENTATIONS, SCORES, STATISTICS, kernels_of_device
from retro_jax import make_mesh
from retro_jax.experiments.bench.bandwidth import read_bandwidth
from retro_jax.experiments.bench.device_time import Timing, device_time
from retro_jax.experiments.bench.kernel_baselines import BASELINES, FLASHINFER, Baseline, versions
from retro_jax.experiments.bench.kernel_cases import (
    Case,
    Dimensions,
    device_memory,
    parse_case,
    prepare,
    sets_for,
)
from retro_jax.experiments.bench.kernel_report import kernel_report
from retro_jax.experiments.bench.roofline import roofline_pictures
from retro_jax.experiments.io.checks import check_least
from retro_jax.experiments.io.flags import Output
from retro_jax.experiments.io.folders import check_new, write_results
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.machine.devices import local_devices
from retro_jax.experiments.machine.memory import check_room
from retro_jax.models.names import nearest


@dataclass(frozen=True)
class Row:
    """One implementation's time on one case.

    Attributes:
        operation: as in `Case`.
        case: its sizes in words.
        window: slots of attention; None where there is no window.
        implementation: of this library, or the baseline and its fastest variant.
        baseline: the other library's name; None for this library.
        bytes: that a call cannot avoid to move.
        sets: of inputs that the calls took in turn.
        timing: of the call.
        gb_per_s: bytes over busy time, in 1e9 bytes per second.
        share_of_ceiling: of the read bandwidth.
        ceiling_us: what the bytes take at the read bandwidth, microseconds.
        events_us: a call by CUDA events around all calls; None without torch.
        variants: busy microseconds of each of a baseline's variants that ran.
        over_flashinfer: busy time over that of FlashInfer on the same case; None where there is none.
    """

    operation: str
    case: str
    window: int | None
    implementation: str
    baseline: str | None
    bytes: int
    sets: int
    timing: Timing
    gb_per_s: float
    share_of_ceiling: float
    ceiling_us: float
    events_us: float | None = None
    variants: dict[str, float] | None = None
    over_flashinfer: float | None = None


@dataclass(kw_only=True)
class BenchKernels(Output):
    """Measure the operations on pages one by one: device time, bandwidth, and how far from the device's own.

    Times are medians over calls. Where there is no GPU or TPU they are wall time, and the table says so.
    """

    operations: tuple[Literal["attention", "dense", "select", "update"], ...] = (
        "attention",
        "dense",
        "select",
        "update",
    )
    """Which to measure."""
    implementations: tuple[str, ...] | None = None
    """Of "xla", "mosaic_gpu" and "mosaic_tpu"; None: this backend's kernels, and "xla"."""
    baselines: tuple[Literal["jax", "flashinfer", "torch"], ...] = ("jax", "flashinfer", "torch")
    """Attention of jax.nn, FlashInfer and torch beside it, each where it is installed; none may be given."""
    cases: tuple[str, ...] = ("1x32768@0.125", "1x131072@0.14", "8x32768@0.125")
    """Of attention: sequences x tokens in the cache @ share of the pages that is read."""
    contexts: tuple[str, ...] = ("1x32768", "8x32768")
    """Of dense attention and update: sequences x tokens in the cache."""
    windows: tuple[int, ...] = (1, 4, 16)
    """Window sizes of attention."""
    select_pages: tuple[int, ...] = (2048, 8192)
    """Of selection: pages of one sequence."""
    select_share: float = 0.15
    """Of selection: share of the pages that is chosen."""
    scores: tuple[str, ...] = tuple(SCORES)
    """Of selection: how pages are scored."""
    statistics: tuple[str, ...] = tuple(STATISTICS)
    """Of selection, those that a score reads, and of update: what is kept of pages."""
    group_reduces: tuple[str, ...] = ("mean", "mass")
    """Of selection: how the scores of a group's query heads become one."""
    update_tokens: int = 4
    """Of update: consecutive tokens."""
    kv_heads: int = 8
    """KV heads."""
    group: int = 4
    """Query heads per KV head."""
    head_dim: int = 128
    """Channels of a head."""
    page_size: int = 16
    """Tokens per page."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of queries, keys, values and statistics."""
    cache_dtype: Literal["bfloat16", "float32", "int8", "float8_e4m3fn"] | None = None
    """Of keys and values in pages, for attention, dense attention and update; None: as --dtype. Other
    libraries' are as --dtype."""
    calls: int = 50
    """Timed calls of each implementation on each case."""
    warm_up: int = 5
    """Calls before those."""
    ceiling_bytes: int = 2 << 30
    """Size of the array whose reading gives the ceiling."""
    seed: int = 0
    """Of the inputs."""
    out: Path | None = None
    """Folder for table.md, results.json and roofline.png; it must not exist."""

    def run(self) -> None:
        """Times everything, then writes and prints the table."""
        check_new(self.out)
        self._check()
        # Read when the backend starts: other libraries need memory of the same device.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        local_devices()
        implementations = self.implementations or tuple(dict.fromkeys([kernels_of_device() or "xla", "xla"]))
        dims = Dimensions(
            self.kv_heads, self.group, self.head_dim, self.page_size, self.dtype, self.cache_dtype
        )
        with Progress() as progress, jax.set_mesh(make_mesh(1, 1)):
            values = self._measure(dims, implementations, progress)
        report = kernel_report(values)
        if self.out is not None:
            write_results(self.out, values, report, roofline_pictures(values))
        self.show(values, report)

    def planned(self) -> list[Case]:
        """Returns the cases that the flags ask for.

        Raises:
          ValueError: a case cannot be read.
        """
        shared = [parse_case(text, shared=True) for text in self.cases]
        contexts = [parse_case(text, shared=False)[:2] for text in self.contexts]
        every = {
            "attention": [Case("attention", *case, window=w) for case in shared for w in self.windows],
            "dense": [Case("dense", *case) for case in contexts],
            "select": [
                Case("select", 1, pages * self.page_size, self.select_share, 1, score, 0, kind, reduce)
                for pages, score in itertools.product(self.select_pages, self.scores)
                for kind in SCORES[score].statistics
                for reduce in self.group_reduces
                if kind in self.statistics
            ],
            "update": [
                Case("update", *case, tokens=self.update_tokens, statistics=kind)
                for case in contexts
                for kind in self.statistics
            ],
        }
        return [case for operation in dict.fromkeys(self.operations) for case in every[operation]]

    def _check(self) -> None:
        numbers = (
            "kv_heads", "group", "head_dim", "page_size", "update_tokens", "calls", "warm_up",
            "ceiling_bytes",
        )  # fmt: skip
        for name in numbers:
            check_least(**{name: getattr(self, name)})
        if not 0 < self.select_share <= 1:
            raise ValueError(f"--select-share is {self.select_share}; it must be above 0 and at most 1")
        if min(self.select_pages, default=2) < 2:
            raise ValueError(f"--select-pages is {min(self.select_pages)}; it must be 2 or more")
        lists = {"implementations": IMPLEMENTATIONS, "scores": SCORES}
        for name, known in (lists | {"statistics": STATISTICS, "group_reduces": GROUP_REDUCE}).items():
            for value in getattr(self, name) or ():
                if value not in known:
                    flag, what = name.replace("_", "-"), f"{value!r} is unknown{nearest(value, known)}"
                    raise ValueError(f"--{flag} {what}; use {', '.join(known)}")
        planned = self.planned()
        if not planned:
            raise ValueError("there is nothing to measure; name --operations, and sizes for them")
        for case in planned:
            if not 1 <= case.window <= case.context:
                raise ValueError(
                    f"--windows {case.window} is not within 1..{case.context}, the tokens of a case"
                )
            if case.operation == "update" and case.tokens + self.page_size > case.context:
                raise ValueError(
                    f"--update-tokens {case.tokens} and a page of {self.page_size} do not fit into a context "
                    f"of {case.context} tokens; choose larger --contexts"
                )

    def _measure(self, dims: Dimensions, implementations: Sequence[str], progress: Progress) -> dict:
        ceilings = read_bandwidth(self.ceiling_bytes, self.calls, self.warm_up)
        timer = Timer(dims, self.calls, self.warm_up, self.seed, max(ceilings.values()), self.traceback)
        cases = self.planned()
        # One query is what other libraries compute, whatever the window.
        attended = [replace(case, window=1) for case in cases if case.operation in ("attention", "dense")]
        attended, baselines = list(dict.fromkeys(attended)), dict.fromkeys(self.baselines)
        total, done = len(cases) * len(implementations) + len(attended) * len(baselines), 0
        for case, name in itertools.product(cases, implementations):
            timer.ours(case, name)
            progress("kernels", done := done + 1, total)
        # Last, so that nothing that other libraries load into the process can spoil what is timed above.
        for name in baselines if attended else ():
            missing = BASELINES[name].missing()
            if missing:
                timer.skip(BASELINES[name].name, missing)
            for case in attended:
                if not missing:
                    timer.baseline(case, BASELINES[name])
                progress("kernels", done := done + 1, total)
        if not timer.rows:
            raise ValueError("nothing could be measured; the reasons are above")
        return {
            "dimensions": asdict(dims),
            "calls": self.calls,
            "warm_up": self.warm_up,
            "seed": self.seed,
            "ceiling_gb_per_s": max(ceilings.values()),
            "ceilings_gb_per_s": ceilings,
            "rows": [asdict(row) for row in over_flashinfer(timer.rows)],
            "skipped": timer.skipped,
            "baseline_versions": versions(),
            "provenance": provenance(),
        }


class Timer:
    """Times implementations and keeps their rows; what cannot run is told on stderr and kept as skipped.

    Args:
        dims: sizes that all cases share.
        calls: to time.
        warm_up: calls before those.
        seed: of the inputs.
        ceiling: read bandwidth in 1e9 bytes per second.
        traceback: show where the errors of what is skipped were raised.
    """

    def __init__(
        self, dims: Dimensions, calls: int, warm_up: int, seed: int, ceiling: float, traceback: bool = False
    ):
        self.rows: list[Row] = []
        self.skipped: list[dict[str, str]] = []
        self._dims, self._calls, self._warm_up, self._seed = dims, calls, warm_up, seed
        self._ceiling, self._traceback = ceiling, traceback

    def ours(self, case: Case, implementation: str) -> None:
        """Times an implementation of this library."""
        sets = self._sets(case, case.footprint(self._dims))

        def time() -> Timing:
            total = self._calls + self._warm_up
            check_room(case.name(self._dims), sets * case.footprint(self._dims), f"{sets} sets of inputs")
            call = prepare(case, self._dims, implementation, sets, total, self._seed)
            return device_time(call, self._calls, self._warm_up)

        window = case.window if case.operation == "attention" else None
        timing = self._attempt(self._words(case, window, implementation), time)
        if timing:
            moved = case.bytes(self._dims)
            self._add(case, sets, moved, timing, window=window, implementation=implementation, baseline=None)

    def baseline(self, case: Case, baseline: Baseline) -> None:
        """Times all variants of another library and keeps the fastest."""
        dims = replace(self._dims, cache_dtype=None)
        sets = self._sets(case, baseline.footprint(case, dims))
        found: dict[str, tuple[Timing, float | None]] = {}
        for variant in baseline.variants:
            result = self._attempt(
                self._words(case, None, _labelled(baseline, variant)),
                partial(baseline.time, variant, case, dims, sets, self._calls, self._warm_up, self._seed),
            )
            if result:
                found[variant] = result
        if found:
            fastest = min(found, key=lambda variant: found[variant][0].busy_us)
            timing, events_us = found[fastest]
            self._add(
                case,
                sets,
                case.bytes(dims),
                timing,
                window=None,
                implementation=_labelled(baseline, fastest),
                baseline=baseline.name,
                events_us=events_us,
                variants={variant: timing.busy_us for variant, (timing, _) in found.items()},
            )

    def skip(self, what: str, why: str) -> None:
        """Notes what is left out."""
        why = why.strip().splitlines()[0] if why.strip() else "no reason given"
        self.skipped.append({"what": what, "why": why})
        print(f"skipped {what}: {why}", file=sys.stderr, flush=True)

    def _attempt[Result](self, what: str, function: Callable[[], Result]) -> Result | None:
        """Whatever one contestant fails by, the times of the others must not be lost."""
        try:
            with redirect_stdout(sys.stderr):  # what other libraries print is no result
                return function()
        except Exception as error:
            if self._traceback:
                print_exc()
            self.skip(what, f"{type(error).__name__}: {error}")
            return None

    def _words(self, case: Case, window: int | None, implementation: str) -> str:
        slots = "" if window is None else f", window {window}"
        return f"{case.operation} {case.name(self._dims)}{slots}: {implementation}"

    def _sets(self, case: Case, footprint: int) -> int:
        return sets_for(case.rotated(self._dims), footprint, self._calls, device_memory())

    def _add(
        self,
        case: Case,
        sets: int,
        moved: int,
        timing: Timing,
        window: int | None,
        implementation: str,
        **values,
    ) -> None:
        rate = moved / timing.busy_us / 1e3
        row = Row(
            operation=case.operation,
            case=case.name(self._dims),
            window=window,
            implementation=implementation,
            bytes=moved,
            sets=sets,
            timing=timing,
            gb_per_s=rate,
            share_of_ceiling=rate / self._ceiling,
            ceiling_us=moved / self._ceiling / 1e3,
            **values,
        )
        self.rows.append(row)
        # At once, for runs that are stopped before they come to the table.
        words = self._words(case, window, implementation)
        print(f"{words}: {timing.busy_us:.2f} us ({timing.how})", file=sys.stderr, flush=True)


def over_flashinfer(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with their times over FlashInfer's on the same case, where it ran."""
    times = {(row.operation, row.case): row.timing.busy_us for row in rows if row.baseline == FLASHINFER.name}
    return [
        replace(row, over_flashinfer=row.timing.busy_us / times[row.operation, row.case])
        if (row.operation, row.case) in times
        else row
        for row in rows
    ]


def _labelled(baseline: Baseline, variant: str) -> str:
    return f"{baseline.name} ({variant})" if variant else baseline.name
