"""How long a device works on a call: timestamps of its kernels from the profiler, not the host's clock.

A kernel of ten microseconds cannot be timed from the host, which takes longer to launch it. The profiler
records when each kernel began and ended on the device; each call is waited for before the next, to tell them
apart.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions

LINES = {"/device:GPU": "Stream #", "/device:TPU": "XLA Ops"}
"""Planes of a trace by the beginning of their names, and their lines that hold what the device executed.
Other lines hold the same time again, by module or by step, or what the profiler itself cost."""

DEVICE, MEAN, EVENTS, WALL = "device", "device mean", "events", "wall"
"""How a time was taken; see `Timing.how`."""


@dataclass(frozen=True)
class Event:
    """Something a device executed: a kernel, a copy or a fill.

    Attributes:
        name: of the kernel.
        start_ns: on the device's clock.
        duration_ns: how long it ran.
    """

    name: str
    start_ns: float
    duration_ns: float

    @property
    def end_ns(self) -> float:
        """When it ended, on the device's clock."""
        return self.start_ns + self.duration_ns


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    Attributes:
        name: as the profiler has it.
        us: microseconds, median over calls.
    """

    name: str
    us: float


@dataclass(frozen=True)
class Timing:
    """How long a call takes, in microseconds.

    Attributes:
        how: "device": median over calls by the device's clock; "device mean": by the device's clock too,
            but the calls could not be told apart, so that it is the time of all over their number; "events":
            events of the device around all calls, over their number, where the trace lacks them; "wall":
            median by the host's clock, launch included, where there is no device trace.
        busy_us: time in which at least one kernel of the call ran.
        busy_us_10_90: percentiles 10 and 90 of the same over calls; the mean where there is no median.
        span_us: from the start of the call's first kernel to the end of its last; None where it is not known.
        wall_us: median by the host's clock, waiting included.
        calls: that were timed.
        kernels: of one call in the order of their start, empty without a device trace; for "device mean" one
            for each name, with its time in all calls over their number.
    """

    how: str
    busy_us: float
    busy_us_10_90: tuple[float, float]
    span_us: float | None
    wall_us: float
    calls: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Executed:
    """What a device executed in one of many equal parts of its work, the mean over them.

    Attributes:
        busy_ms: milliseconds in which at least one kernel ran.
        launches: kernels, copies and fills.
        kernels: launches and microseconds by name, those that took longest first.
    """

    busy_ms: float
    launches: float
    kernels: dict[str, tuple[float, float]]


def device_time(
    call: Callable[[int], Any],
    calls: int = 50,
    warm_up: int = 5,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
    """Times calls of one program, each finished before the next begins.

    Args:
      call: launches call number 0, 1, ...; warm-up comes first. Every call must launch the same kernels.
      calls: to time.
      warm_up: calls before those, for compilation and the clocks.
      wait: returns when what it is given, a call's result, is computed.

    Raises:
      ValueError: calls or warm_up is below 1.
    """
    if min(calls, warm_up) < 1:
        raise ValueError(f"{calls} calls after {warm_up} of warm-up cannot be timed; both must be 1 or more")
    for index in range(warm_up):
        wait(call(index))
    return summarize(*_traced(lambda index: wait(call(warm_up + index)), calls))


def executed(call: Callable[[int], Any], calls: int, parts: int) -> Executed | None:
    """What a device executes in calls that have been compiled before; None where there is no device trace.

    Args:
      call: does call number 0, 1, ... and waits for it.
      calls: to trace, not all of which must launch the same kernels.
      parts: equal parts that each call consists of, as the steps of a scan.
    """
    if jax.default_backend() == "cpu":
        return None
    events, _ = _traced(call, calls)
    if not events:
        return None
    total, of_name = calls * parts, {}
    for event in events:
        of_name.setdefault(event.name, []).append(event.duration_ns / 1e3)
    by_time = sorted(of_name.items(), key=lambda item: -sum(item[1]))
    kernels = {name: (len(us) / total, sum(us) / total) for name, us in by_time}
    return Executed(busy_ns(events) / total / 1e6, len(events) / total, kernels)


def _traced(call: Callable[[int], Any], calls: int) -> tuple[list[Event], list[float]]:
    """What the device executed in calls that wait, and the seconds that each took."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix="retro-jax-trace-") as folder:
        # A CPU's trace has no kernels, and taking one would slow its wall time down.
        with nullcontext() if jax.default_backend() == "cpu" else _trace(folder):
            for index in range(calls):
                start = time.perf_counter()
                call(index)
                seconds.append(time.perf_counter() - start)
        events = [
            event
            for file in sorted(Path(folder).rglob("*.xplane.pb"))
            for event in device_events(ProfileData.from_file(str(file)))
        ]
    return events, seconds


def device_events(profile: ProfileData) -> list[Event]:
    """Returns everything that the first accelerator in a trace executed, in the order of its start."""
    planes = [plane for plane in profile.planes if plane.name.startswith(tuple(LINES))]
    first = min(planes, key=lambda plane: (len(plane.name), plane.name), default=None)
    events = [
        Event(event.name, event.start_ns, event.duration_ns)
        for prefix, line_prefix in LINES.items()
        if first and first.name.startswith(prefix)
        for line in first.lines
        if line.name.startswith(line_prefix)
        for event in line.events
    ]
    return sorted(events, key=lambda event: (event.start_ns, event.end_ns))


def summarize(events: Sequence[Event], seconds: Sequence[float]) -> Timing:
    """Returns the timing of calls from what the device executed and each call's wall time.

    Args:
      events: of all calls; none where there is no trace.
      seconds: wall time of each call.
    """
    wall = np.array(seconds) * 1e6
    if not events:
        return Timing(WALL, _median(wall), _percentiles(wall), _median(wall), _median(wall), len(seconds), ())
    groups = split_calls(events, len(seconds))
    if groups is None:
        mean = busy_ns(events) / len(seconds) / 1e3
        names = dict.fromkeys(event.name for event in events)
        totals = {name: sum(event.duration_ns for event in events if event.name == name) for name in names}
        kernels = tuple(Kernel(name, total / len(seconds) / 1e3) for name, total in totals.items())
        return Timing(MEAN, mean, (mean, mean), None, _median(wall), len(seconds), kernels)
    busy = np.array([busy_ns(group) for group in groups]) / 1e3
    span = [(max(event.end_ns for event in group) - group[0].start_ns) / 1e3 for group in groups]
    return Timing(
        DEVICE,
        _median(busy),
        _percentiles(busy),
        _median(span),
        _median(wall),
        len(seconds),
        _kernels(groups),
    )


def busy_ns(events: Iterable[Event]) -> float:
    """Returns how long at least one event ran: where several overlap, as with dependent launch, once."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_ns):
        total += max(0.0, event.end_ns - max(event.start_ns, reached))
        reached = max(reached, event.end_ns)
    return total


def split_calls(events: Sequence[Event], calls: int) -> list[list[Event]] | None:
    """Divides the events of equal calls, one after another, into those of each.

    Args:
      events: in any order.
      calls: how many calls there were.

    Returns:
      each call's events in the order of their start; None if the calls did not all launch the same kernels.
    """
    each, rest = divmod(len(events), calls)
    if rest or not each:
        return None
    ordered = sorted(events, key=lambda event: (event.start_ns, event.end_ns))
    groups = [list(group) for group in itertools.batched(ordered, each)]
    # Kernels of several streams may begin in another order each time.
    names = [sorted(event.name for event in group) for group in groups]
    return groups if all(other == names[0] for other in names) else None


def _kernels(groups: Sequence[Sequence[Event]]) -> tuple[Kernel, ...]:
    """The median of every kernel; several launches of one name are told apart by their order."""
    durations: dict[tuple[str, int], list[float]] = {}
    for group in groups:
        seen: dict[str, int] = {}
        for event in group:
            launch = seen[event.name] = seen.get(event.name, 0) + 1
            durations.setdefault((event.name, launch), []).append(event.duration_ns / 1e3)
    return tuple(Kernel(name, _median(values)) for (name, _), values in durations.items())


def _trace(folder: str):
    options = ProfileOptions()
    options.python_tracer_level = 0  # the host's functions are of no use here, and recording them takes long
    options.host_tracer_level = 1
    return jax.profiler.trace(folder, profiler_options=options)


def _median(values) -> float:
    return float(np.median(values))


def _percentiles(values) -> tuple[float, float]:
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)
