"""The folder of a run: its configuration, and results as JSON lines that survive any kill.

    config.json           what the run is, and how each of its methods decodes; written first, never changed
    results-P.jsonl       by host P: one line per (example, method, sample), in the order of the work
    timings-P.jsonl       by host P: one line per batch and method, wall time; for the latency plot
    provenance-P.jsonl    by host P: one line per start

A batch's lines are appended in one write and synced. A kill can leave a torn last line, which the next start
cuts off and computes again; everything before it is whole.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from retro_jax import DecodeConfig
from retro_jax.experiments.io.files import finite, read_json, sync_folder
from retro_jax.experiments.io.folders import ResultFolder
from retro_jax.experiments.runs.config import method_fields

CONFIG = "config.json"
KEYS = ("example", "method", "sample")
IDENTITY = ("name", "config", "examples")
METHODS = "methods"
"""The `DecodeConfig` of each method, by the name that its results have; earlier versions did not tell it."""


class RunFolder(ResultFolder):
    """A folder of results that only this process's host writes its own part of.

    Args:
      path: made if it is not there.
      identity: what the run is, as JSON values: `IDENTITY` and `METHODS`.
      process: this host's number.
    """

    kind, file = "run", CONFIG

    def __init__(self, path: Path, identity: dict, process: int = 0):
        super().__init__(path, identity)
        self.process = process
        self.begin()

    @classmethod
    def differences(cls, found: dict, wanted: dict) -> str:
        """As in `ResultFolder`."""
        if METHODS in wanted and METHODS not in found:
            return "of an earlier version; retro-jax report still reads it"
        return super().differences(found, wanted)

    def __enter__(self) -> "RunFolder":
        self._file = os.open(self._results, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise ValueError(
                    f"another process is writing {self._results}; wait for it, or choose another --out"
                ) from None
            raise OSError(
                f"{self._results} cannot be locked ({error.strerror}); choose an --out on another file system"
            ) from error
        _cut_torn_line(self._results, self._file)
        sync_folder(self.path)
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def done(self) -> set[tuple[str, str, int]]:
        """What is finished, by any host: (example, method, sample)."""
        return {tuple(line[key] for key in KEYS) for line in read_results(self.path)}

    def append(self, lines: Sequence[dict]) -> None:
        """Appends results and waits until they are on the disk.

        Raises:
          OSError: they could not be written; what was there before is as it was.
        """
        _append(self._results, self._file, lines)

    def note(self, name: str, value: dict) -> None:
        """Appends one line to another file of the folder, such as timings; raises as `append`."""
        file = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(self.path / name, file)
            _append(self.path / name, file, [value])
        finally:
            os.close(file)

    @property
    def _results(self) -> Path:
        return self.path / f"results-{self.process}.jsonl"


def read_identity(path: Path) -> dict:
    """What the run in a folder is.

    Raises:
      FileNotFoundError: the folder is not there or holds no run.
      ValueError: its configuration is damaged, or no run's.
    """
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} is not a run's folder: it has no {CONFIG}")
    identity = read_json(path / CONFIG)
    if missing := [key for key in IDENTITY if key not in identity]:
        raise ValueError(
            f"{path / CONFIG} is not a run's: it has no {missing[0]!r}; name the folder of a run"
        )
    return identity


def run_identity(name: str, config: Mapping, methods: Mapping[str, DecodeConfig], examples: str) -> dict:
    """What a run's folder is known by.

    Args:
      name: of the run.
      config: the values that make it another than others.
      methods: how each decodes, by name.
      examples: their digest.
    """
    told = {label: asdict(decode) for label, decode in methods.items()}
    return {"name": name, "config": config, METHODS: told, "examples": examples}


def read_methods(path: Path, identity: Mapping) -> dict[str, DecodeConfig]:
    """How each method of the run in a folder decodes, by the name that its results have.

    An earlier version's folder tells the flags of the run, of which follow its methods and their labels.

    Raises:
      ValueError: they are no configurations of this version.
    """
    try:
        if METHODS in identity:
            return {name: DecodeConfig(**values) for name, values in identity[METHODS].items()}
        asked = identity["config"]
        varied = (asked["methods"], asked.get("presets", ()), asked["windows"], asked["budgets"])
        return {label: DecodeConfig(**asked["decode"] | own) for label, own in method_fields(*varied).items()}
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{path / CONFIG} is damaged, or another version's ({error}); restore it") from error


def read_results(path: Path) -> list[dict]:
    """The results of all hosts; a torn last line, which another host may be writing, is left out.

    Raises:
      ValueError: a line in the middle of a file is broken, or the same result is there twice.
    """
    found = read_lines(sorted(path.glob("results-*.jsonl")), KEYS)
    seen = set()
    for line in found:
        key = tuple(line[name] for name in KEYS)
        if key in seen:
            raise ValueError(
                f"{path} has two results for {', '.join(map(str, key))}; were two folders mixed?"
            )
        seen.add(key)
    return found


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


def _append(path: Path, file: int, lines: Sequence[dict]) -> None:
    data = "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines).encode()
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError as error:
        os.ftruncate(file, size)
        raise OSError(
            f"could not write to {path} ({error.strerror}); what was finished before is intact: free some "
            "space and run the same command again"
        ) from error


def _cut_torn_line(path: Path, file: int) -> None:
    """Cuts off what follows the last whole line, and a last line that is no JSON (a crash of the machine)."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
    if end and _value(data[last : end - 1]) is None:
        end = last
    if end < len(data):
        os.ftruncate(file, end)
        os.fsync(file)


def _value(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
