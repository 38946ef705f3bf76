"""How long JAX compiles in this process, by the events that it reports."""

import threading
import time
from collections.abc import Callable

COMPILE_EVENTS = "/jax/core/compile/"
"""What JAX calls tracing, lowering and XLA's compilation (or reading a program from the persistent cache)."""


class CompileTime:
    """Seconds in which anything was compiled, between `start` and `stop`.

    Compilations inside others, as of a jitted function that another one calls, and those of several threads
    at once are counted once.

    Args:
      changed: called as compiling begins (True) and ends (False), by the thread that compiles.
    """

    def __init__(self, changed: Callable[[bool], None] = lambda _: None):
        self._changed = changed
        self._lock = threading.Lock()
        self._listening = False
        self._running, self._since, self._seconds = 0, 0.0, 0.0

    @property
    def running(self) -> bool:
        """Whether something is compiled now."""
        return self._running > 0

    @property
    def seconds(self) -> float:
        """Seconds so far, up to now if something is compiled now."""
        with self._lock:
            return self._seconds + (time.monotonic() - self._since if self._running else 0.0)

    def start(self) -> None:
        """Begins to listen to JAX; nothing if it does already."""
        from jax import monitoring  # not before a command's work begins: help needs no JAX

        if not self._listening:
            monitoring.register_scalar_listener(self._begin)
            monitoring.register_event_time_span_listener(self._end)
            self._listening = True

    def stop(self) -> None:
        """Ends it; what is compiled later is not counted."""
        from jax import monitoring

        if self._listening:
            monitoring.unregister_scalar_listener(self._begin)
            monitoring.unregister_event_time_span_listener(self._end)
            self._listening = False
            with self._lock:
                running, self._running = self._running, 0
                self._seconds += time.monotonic() - self._since if running else 0.0
            if running:
                self._changed(False)

    def _begin(self, event: str, value: float, **_) -> None:
        if not event.startswith(COMPILE_EVENTS):
            return
        with self._lock:
            self._running += 1
            if first := self._running == 1:
                self._since = time.monotonic()
        if first:
            self._changed(True)

    def _end(self, event: str, start: float, end: float, **_) -> None:
        if not event.startswith(COMPILE_EVENTS):
            return
        with self._lock:
            if not self._running:  # it had begun before `start`
                return
            self._running -= 1
            if last := not self._running:
                self._seconds += time.monotonic() - self._since
        if last:
            self._changed(False)
