"""Ctrl-C from the first moment of a command on.

Nothing is imported here that is not there when the interpreter has started, or nearly so.
"""

import os
import signal
import sys

STOPPED = "\nretro-jax: stopped\n"
INTERRUPTED = 128 + signal.SIGINT


def stop(_: int, frame: object) -> None:
    """Handles SIGINT: during an import it ends the process, as what is imported may print or hide it."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.__stderr__.fileno(), STOPPED.encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def stop_in_words() -> None:
    """Has Ctrl-C handled by `stop`, unless something else handles or ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
