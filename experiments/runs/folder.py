"""The folder of a run: its configuration, and results as JSON lines that survive any kill.

    config.json           what the run is, and how each of its methods decodes; written first, never changed
    results-P.jsonl       by host P: one line per (example, method, sample), as they were finished
    timings-P.jsonl       by host P: one line per batch and method, wall seconds without compiling and grading
    provenance-P.jsonl    by host P: one line per start

Lines of what is finished together are one write (see `io.lines`): what a kill tears is computed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from retro_jax import DecodeConfig
from retro_jax.experiments.io.files import read_json
from retro_jax.experiments.io.folders import ResultFolder
from retro_jax.experiments.io.lines import LineFile, read_lines
from retro_jax.experiments.runs.config import method_fields
from retro_jax.presets import EARLIER_NAMES

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
        self._file = LineFile(self.path / f"results-{self.process}.jsonl").__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._file.__exit__()

    def done(self) -> set[tuple[str, str, int]]:
        """What is finished, by any host: (example, method, sample)."""
        return {tuple(line[key] for key in KEYS) for line in read_results(self.path)}

    def append(self, lines: Sequence[dict]) -> None:
        """Appends results and waits until they are on the disk.

        Raises:
          OSError: they could not be written; what was there before is as it was.
        """
        self._file.append(lines)

    def note(self, name: str, value: dict) -> None:
        """Appends one line to another file of the folder, such as timings; raises as `append`."""
        with LineFile(self.path / name) as file:
            file.append([value])


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
        presets = asked.get("presets", ())
        if renamed := sorted(EARLIER_NAMES.keys() & presets):
            raise ValueError(f"what preset {', '.join(renamed)} was is not told")
        varied = (asked["methods"], presets, asked["windows"], asked["budgets"])
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
