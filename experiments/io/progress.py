"""Progress of long work on stderr: bars on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from retro_jax.experiments.machine.compile_time import CompileTime

SECONDS_BETWEEN_LINES = 15.0
LEAST_COMPILING = 1.0
"""Seconds of compiling from which on it is said."""


class Progress:
    """Shows how far each stage of a piece of work is.

    An instance is what `load_model`, `generate` and `score` take as `progress`: it is called with the name of
    a stage, the amount done and the total (tokens, bytes, ...). Nothing is ever written to stdout.

    Within it, as a context manager, it also says while JAX compiles, if that takes long, and for how many
    seconds it did.

    Args:
        prefix: put before every stage's name.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._compile_time = CompileTime(self._compiling)
        self._said_compiling = False
        self._timer: threading.Timer | None = None
        self._bars: Bars | None = None
        if sys.stderr.isatty():
            self._bars = _Bars(
                self._compile_time,
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                redirect_stdout=False,  # what is printed while bars are shown is a result
            )

    @property
    def compile_seconds(self) -> float:
        """Seconds in which JAX compiled, since it was entered."""
        return self._compile_time.seconds

    def __enter__(self) -> "Progress":
        self._compile_time.start()
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compile_time.stop()
        self.stop()
        if not self._bars and self.compile_seconds >= LEAST_COMPILING:
            self._print(f"{self.prefix}{_compiling_text(self._compile_time)}")

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
            self._print(f"{name}: {done}{f' of {total}' if total else ''}{share}")

    def _compiling(self, begins: bool) -> None:
        """Says so once outside a terminal, where nothing is drawn anew, if it goes on for long."""
        if self._bars or self._said_compiling:
            return
        if begins:
            left = max(LEAST_COMPILING - self.compile_seconds, 0.0)
            self._timer = threading.Timer(left, self._say_compiling)
            self._timer.daemon = True  # the end of the process does not wait for it
            self._timer.start()
        elif self._timer:
            self._timer.cancel()

    def _say_compiling(self) -> None:
        if self._compile_time.running and not self._said_compiling:
            self._said_compiling = True
            self._print(f"{self.prefix}compiling")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Bars(Bars):
    """Bars with a line on compiling below them, which is drawn as often as they are."""

    def __init__(self, compile_time: CompileTime, *columns, **options):
        self._compile_time = compile_time
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._compile_time.seconds >= LEAST_COMPILING:
            yield Text(_compiling_text(self._compile_time))


def _compiling_text(compile_time: CompileTime) -> str:
    return f"{'compiling' if compile_time.running else 'compiled'} for {compile_time.seconds:.0f} s"


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
