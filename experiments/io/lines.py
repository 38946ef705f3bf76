"""Files of JSON lines that are added to, and survive any kill.

Lines that are added together are one write, synced. A kill can leave a torn last line, which the next start
cuts off; everything before it is whole.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from retro_jax.experiments.io.files import finite, sync_folder


class LineFile:
    """A file of JSON lines that this process alone adds to, within `with`; made if it is not there.

    Args:
      path: the file.

    Raises:
      ValueError: another process is writing it.
      OSError: it cannot be locked.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "LineFile":
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise ValueError(
                    f"another process is writing {self.path}; wait for it, or choose another --out"
                ) from None
            raise OSError(
                f"{self.path} cannot be locked ({error.strerror}); choose an --out on another file system"
            ) from error
        self._cut_torn_line()
        sync_folder(self.path.parent)
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def append(self, lines: Sequence[dict]) -> None:
        """Appends lines and waits until they are on the disk; what interrupts it leaves none of them.

        Raises:
          OSError: they could not be written; what was there before is as it was.
        """
        data = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines).encode()
        size = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except BaseException as error:
            os.ftruncate(self._file, size)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"could not write to {self.path} ({error.strerror}); what was finished before is intact: "
                "free some space and run the same command again"
            ) from error

    def _cut_torn_line(self) -> None:
        """Cuts off what follows the last whole line, and a last one that is no JSON (a machine's crash)."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        last = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
        if end and _value(data[last : end - 1]) is None:
            end = last
        if end < len(data):
            os.ftruncate(self._file, end)
            os.fsync(self._file)


def read_lines(files: Iterable[Path], keys: Iterable[str]) -> list[dict]:
    """The JSON lines of files, without a torn last one.

    Args:
        files: which.
        keys: that each line has.

    Raises:
        ValueError: another line is broken, or one lacks a key.
    """
    found = []
    for file in files:
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            value = _value(line)
            if value is None and number < len(lines) - 1:
                raise ValueError(f"{file} line {number} is broken; move the file away, or restore it")
            if value is None:
                continue
            if missing := [key for key in keys if key not in value]:
                raise ValueError(f"{file} line {number} has no {missing[0]!r}; move it away, or restore it")
            found.append(value)
    return found


def _value(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
