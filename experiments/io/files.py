"""Files written in one step, so that nobody finds half of one; JSON values, and how two of them differ."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
