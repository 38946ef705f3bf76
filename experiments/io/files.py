"""A folder of finished runs: raw arrays per run, written at once and never overwritten."""

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from retro_jax import DecodeConfig, Score
from retro_jax.experiments.compare.sweep import order, run_name

IDENTITY = "comparison.json"


@dataclass(frozen=True)
class Run:
    """One method's finished pass over the texts.

    Attributes:
        name: the file's stem, unique in its folder.
        config: what decoded.
        nll: negative log-likelihood of every scored token, natural logarithm.
        exposure: pages a query has attended to after 0, 1, ... later steps, over those of its own step.
        pages_loaded: that a step loaded per sparse layer and KV head, on average.
        kv_bytes: bytes of keys, values and page statistics that a step loaded for a text, on average.
        seconds: wall time of the pass, compilation included.
        provenance: where it was computed.
    """

    name: str
    config: DecodeConfig
    nll: Float[np.ndarray, "B T"]
    exposure: Float[np.ndarray, " W"]
    pages_loaded: float
    kv_bytes: float
    seconds: float
    provenance: dict


class ResultsFolder:
    """A folder of runs of one comparison: the same model, texts and common settings.

    Args:
        path: made when the first run is saved.
        identity: what all runs of the folder share, as JSON values.

    Raises:
        OSError: nothing can be written there.
        ValueError: the folder belongs to another comparison, or holds something else, or is damaged.
    """

    def __init__(self, path: Path, identity: dict):
        self.path = path
        identity = json.loads(json.dumps(identity))
        file = path / IDENTITY
        if file.exists():
            different = differences(read_json(file), identity)
            if different:
                raise ValueError(f"{path} holds another comparison ({different}); choose another --out")
        elif path.exists() and (
            not path.is_dir() or any(".partial" not in found.name for found in path.iterdir())
        ):
            raise ValueError(f"{path} exists and is not a comparison's folder; choose another --out")
        check_writable(path)
        self.identity = identity

    def has(self, name: str) -> bool:
        """Tells whether the run is finished."""
        return self._file(name).exists()

    def save(self, config: DecodeConfig, result: Score, seconds: float, provenance: dict) -> None:
        """Writes one finished run."""
        name = run_name(config)
        metrics = result.metrics
        about = {
            "config": asdict(config),
            "seconds": seconds,
            "provenance": provenance,
            "metrics": metrics.summary(),
        }
        file = self._file(name)
        if file.exists():
            raise FileExistsError(f"{file} is finished already; nothing is overwritten")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / IDENTITY, self.identity)
        file.parent.mkdir(exist_ok=True)
        arrays = {
            "nll": result.nll,
            "pages_attended": metrics.pages_attended,
            "pages_loaded": metrics.pages_loaded,
            "kv_bytes": metrics.kv_bytes,
            "about": json.dumps(about),
        }
        write_file(file, lambda stream: np.savez_compressed(stream, **arrays))

    def load(self, name: str) -> Run:
        """Reads one finished run.

        Raises:
            ValueError: its file is damaged.
        """
        try:
            with np.load(self._file(name), allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                return Run(
                    name=name,
                    config=DecodeConfig(**about["config"]),
                    nll=arrays["nll"],
                    exposure=np.array(about["metrics"]["exposure"], float),
                    pages_loaded=about["metrics"]["pages_loaded"],
                    kv_bytes=about["metrics"]["kv_bytes"],
                    seconds=about["seconds"],
                    provenance=about["provenance"],
                )
        except (ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{self._file(name)} is damaged, or another version's ({error}); move it away, and the same "
                "command computes it again"
            ) from error

    def runs(self) -> list[Run]:
        """Reads every finished run, full attention first, then in the order of `order`."""
        found = [self.load(file.stem) for file in (self.path / "runs").glob("*.npz")]
        return sorted(found, key=lambda run: order(run.config))

    def _file(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.npz"


def write_json(path: Path, value: dict) -> None:
    """Writes JSON in one step; numbers that are not finite become null."""
    write_bytes(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Writes a file in one step."""
    write_file(path, lambda stream: stream.write(contents))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file in one step, so that no reader, no kill and no full disk ever leaves half of it.

    Args:
        path: the file; replaced if it is there.
        write: writes the contents into a stream.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # else a crash could keep the name and lose the contents
        partial.replace(path)
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error.strerror or error}); nothing of it was kept: make room there, "
            "or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where its file system can."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(file)
    finally:
        os.close(file)


def read_json(path: Path, way_out: str = "restore it, or start anew in another folder") -> dict:
    """Reads a JSON object, by default one that `write_json` wrote.

    Args:
        path: the file.
        way_out: what to do where it is damaged.

    Raises:
        ValueError: the file is damaged.
    """
    contents = path.read_bytes()
    try:
        value = json.loads(contents)
    except ValueError as error:
        value = None
        reason = str(error) if contents.strip(b"\0\n ") else "it is empty"
    else:
        reason = "it holds no JSON object"
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged ({reason}); {way_out}")
    return value


def check_writable(folder: Path) -> None:
    """Raises OSError if a folder, which need not be there yet, cannot be written to: before work is lost."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so {folder} cannot be a folder; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} cannot be written to; choose another --out")


def print_json(values: dict) -> None:
    """Prints one JSON object; numbers that are not finite become null."""
    print(json.dumps(finite(values)))


def finite(value):
    """Returns the same JSON value with None for every number that is not finite."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def differences(found: dict, wanted: dict) -> str:
    """Returns which values of two JSON objects differ, the first four of them in words; empty if none."""
    found, wanted = _flat(found), _flat(wanted)
    different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    changes = "; ".join(f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in different[:4])
    return changes + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _flat(value: dict, prefix: str = "") -> dict:
    items = {}
    for key, item in value.items():
        items |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return items
