"""Progress of long work on stderr: bars on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows how far each stage of a piece of work is.

    An instance is what `load_model`, `generate` and `score` take as `progress`: it is called with the name of
    a stage, the amount done and the total (tokens, bytes, ...). Nothing is ever written to stdout.

    Args:
        prefix: put before every stage's name.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._bars: Bars | None = None
        if sys.stderr.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                redirect_stdout=False,  # what is printed while bars are shown is a result
            )

    def __enter__(self) -> "Progress":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the bars as they are, to make way for other text on the same screen."""
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        """Reports that `done` of `total` units of `stage` are finished; total None: not known."""
        name = f"{self.prefix}{stage}"
        if self._bars:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total)
            self._bars.update(self._tasks[name], completed=done, total=total)
        else:
            self._line(name, done, total)

    def _line(self, name: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        first = name not in self._last_line
        if first:
            self._last_line[name] = now
        if now - self._last_line[name] >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = now
            share = f" ({done / total:.0%})" if total else ""
            print(f"{name}: {done}{f' of {total}' if total else ''}{share}", file=sys.stderr, flush=True)


class Rates:
    """Passes progress on and measures how fast each stage goes.

    Args:
      show: where progress is shown.
    """

    def __init__(self, show: Progress):
        self.show = show
        self._start = time.perf_counter()
        self._reports: dict[str, list[tuple[float, int]]] = {}

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        """As `Progress`."""
        self._reports.setdefault(stage, []).append((time.perf_counter(), done))
        self.show(stage, done, total)

    @property
    def seconds(self) -> float:
        """Seconds from the beginning to the last report."""
        return max((reports[-1][0] for reports in self._reports.values()), default=self._start) - self._start

    def per_second(self, stage: str) -> float | None:
        """Units of a stage per second between its first report and the last but one, if they differ.

        The first call has compiled, and the last one may have computed more than was asked for.
        """
        reports = self._reports.get(stage, [])[:-1]
        if len(reports) < 2:
            return None
        (begin, before), (end, after) = reports[0], reports[-1]
        return (after - before) / (end - begin)
