"""Runs a program that a model wrote: in a process with limits, in an empty folder, without network if it can.

This holds off accidents, not attacks: run it in a container or a virtual machine if the model is not trusted.
"""

import contextlib
import ctypes
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

OUTPUT_BYTES = 10_000_000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def run_python(source: str, given: str, seconds: float, memory_mb: int) -> str | None:
    """What a Python program prints.

    It runs as by `python -I` in an empty temporary folder with an empty environment; network access is taken
    away where the system lets an ordinary user do that (Linux user namespaces).

    Args:
      source: the program.
      given: its standard input.
      seconds: limit of wall time and of processor time.
      memory_mb: limit of its address space.

    Returns:
      Its standard output; None if it failed, took too long or wrote more than 10 MB. To exit, with whatever
      status, is no failure.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8")
        # It limits itself: code of ours between fork and exec would not be safe among JAX's threads.
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(program), str(seconds), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(given.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()
        output.seek(0)
        return output.read().decode(errors="replace") if process.returncode == 0 else None


def _limit(seconds: float, memory_mb: int) -> None:
    """Limits this process."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is not None:
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET)  # refused by some systems; then the network stays
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_FSIZE: OUTPUT_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    _, _program, _seconds, _memory = sys.argv
    _limit(float(_seconds), int(_memory))
    sys.argv = [_program]
    with contextlib.suppress(SystemExit):
        runpy.run_path(_program, run_name="__main__")
