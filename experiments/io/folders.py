"""Folders of results that were all made in one way, which a JSON file in each of them tells."""

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.io.files import check_writable, differences, read_json, write_bytes, write_json


def digest(value: Mapping | list) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_new(out: Path | None) -> None:
    """Raises ValueError if results would be written over something; None: they are not written."""
    if out is not None and out.exists():
        raise ValueError(f"{out} exists and is not overwritten; choose another --out")


def write_results(folder: Path, values: dict, table: str, shown: Mapping[str, bytes]) -> None:
    """Writes results.json, table.md, and pictures and pages by file name into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", values)
    for name, contents in ({"table.md": table.encode()} | dict(shown)).items():
        write_bytes(folder / name, contents)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """While a file of arrays and their JSON is read: what is raised becomes a ValueError with the way out."""
    try:
        yield
    except (ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged, or another version's ({error}); move it away, and the same command computes "
            "it again"
        ) from error


class ResultFolder:
    """A folder whose results can be added to, and are never overwritten.

    Args:
      path: made by `begin`.
      identity: what all results of the folder share, as JSON values.

    Raises:
      OSError: nothing can be written there.
      ValueError: the folder belongs to something else, or is damaged.
    """

    kind: ClassVar[str]
    """What it holds, in one word."""
    file: ClassVar[str]
    """The name of the file that tells its identity."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.check(path, self.identity)

    @classmethod
    def check(cls, path: Path, identity: dict, *, partial: bool = False) -> None:
        """Raises, as the class does, if results of this identity cannot be written into a folder.

        Args:
          path: the folder.
          identity: what its results share, as JSON values.
          partial: whether those are only what is known so far; others are not looked at.
        """
        if (path / cls.file).exists():
            found = read_json(path / cls.file)
            if partial:
                found = {key: value for key, value in found.items() if key in identity}
            if different := cls.differences(found, json.loads(json.dumps(identity))):
                raise ValueError(f"{path} holds another {cls.kind} ({different}); choose another --out")
        elif path.exists() and (
            not path.is_dir() or any(".partial" not in found.name for found in path.iterdir())
        ):
            raise ValueError(f"{path} exists and is not a {cls.kind}'s folder; choose another --out")
        check_writable(path)

    @classmethod
    def differences(cls, found: dict, wanted: dict) -> str:
        """How the identity that a folder has differs from another, in words; empty if it does not."""
        return differences(found, wanted)

    def begin(self) -> None:
        """Makes the folder, and writes the file that tells its identity, unless they are there."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / self.file).exists():
            write_json(self.path / self.file, self.identity)
