"""Folders of arrays that orbax writes, with a JSON object that says what they are.

A folder gets its name when all of it is written, and what is there is never replaced. Each process writes and
reads its part of arrays that lie on several, to and from a folder that all of them see.

A folder holds `about/about.json`, `arrays/` in orbax's format, and further JSON objects by name. The JSON
object says the kind and the version of the contents, and dtype, shape and fingerprint of the arrays.
"""

import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from retro_jax.models.fingerprint import fingerprint

VERSION = 1
"""Of what is written; a change after which older folders would be misread needs another."""

_ABOUT, _ARRAYS = "about", "arrays"
_UNFINISHED = ".orbax-checkpoint-tmp"
"""What orbax adds to a name until all is written."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of these, or what is left of one that was not finished."""
    return _about_file(folder).is_file() or bool(_unfinished(folder))


def check_new(folder: Path) -> None:
    """Raises OSError if a folder of this name cannot be written, before work is lost."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is not overwritten; choose another folder")
    nearest = next(path for path in folder.absolute().parents if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so {folder} cannot be a folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} cannot be written to; choose another place than {folder}")


def write_checkpoint(
    folder: Path,
    kind: str,
    about: Mapping[str, Any],
    arrays: Mapping[str, Array],
    **objects: Mapping[str, Any],
) -> None:
    """Writes a folder; all processes that share the arrays call it.

    Args:
        folder: must not exist.
        kind: of the contents, such as "model".
        about: what else is to be known of them, as JSON values.
        arrays: by name; those without elements are not written.
        **objects: further JSON objects.

    Raises:
        OSError: the folder exists, or could not be written; nothing of it is kept then.
    """
    check_new(folder)
    folder = folder.absolute()
    arrays = {name: array for name, array in arrays.items() if array.size}
    about = {
        "kind": kind,
        "version": VERSION,
        "retro_jax": metadata.version("retro-jax"),
        **about,
        "fingerprint": fingerprint(arrays),
        "arrays": {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()},
    }
    import orbax.checkpoint as ocp

    items = {_ABOUT: ocp.args.JsonSave(about), _ARRAYS: ocp.args.PyTreeSave(arrays)}
    items |= {name: ocp.args.JsonSave(value) for name, value in objects.items()}

    def write(checkpointer: ocp.Checkpointer) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpointer.save(folder, args=ocp.args.Composite(**items))

    try:
        _by_orbax(write, arrays, *objects)
    except BaseException as error:
        if jax.process_index() == 0:
            _remove(folder.with_name(folder.name + _UNFINISHED))
        if isinstance(error, _Failed) and error.number is not None:
            raise OSError(
                f"could not write {folder} ({os.strerror(error.number)}); nothing of it was kept: make room "
                "there, or choose another place"
            ) from None
        raise


def read_about(folder: Path, kind: str) -> dict[str, Any]:
    """The JSON object of a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder was not finished, is damaged, or of another kind or version.
    """
    if left := _unfinished(folder):
        raise ValueError(
            f"{folder} is half-written ({left.name} is left of what was stopped); delete that and write it "
            "again"
        )
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    about = read_object(folder, _ABOUT)
    if about.get("kind") != kind:
        raise ValueError(f"{folder} holds a {about.get('kind')}, not a {kind}")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{folder} has the format {about.get('version')!r} of retro-jax {about.get('retro_jax')}, this "
            f"version reads {VERSION}; read it with that version, or write it again with this one"
        )
    return about


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder by its name.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = _object_file(folder, name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} is none of retro-jax's folders, or a part of one: it has no {name}/{path.name}"
        ) from error
    except ValueError as error:
        raise _damaged(folder, f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(folder, f"{path} holds no JSON object")
    return value


def read_arrays(
    folder: Path, about: Mapping[str, Any], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """The arrays of a folder, each part of them read to where it belongs.

    Args:
        folder: was written by `write_checkpoint`.
        about: its JSON object.
        targets: shape, dtype and sharding of each; those without elements were not written. An array may be
            longer along any of its axes than it was: it is filled up with zeros.

    Raises:
        ValueError: the folder has other arrays, or is damaged.
    """
    import orbax.checkpoint as ocp

    wanted = {name: target for name, target in targets.items() if math.prod(target.shape)}
    stored = {name: (dtype, tuple(shape)) for name, (dtype, shape) in about["arrays"].items()}
    _check_arrays(folder, stored, wanted)
    how = {
        name: ocp.ArrayRestoreArgs(
            sharding=target.sharding, global_shape=target.shape, dtype=target.dtype, strict=False
        )
        for name, target in wanted.items()
    }

    def read(checkpointer: ocp.Checkpointer) -> dict[str, Array]:
        restore = ocp.args.PyTreeRestore(item=wanted, restore_args=how)
        return checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**{_ARRAYS: restore}))[_ARRAYS]

    try:
        arrays = _by_orbax(read, wanted)
    except _Failed as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise _damaged(folder, str(error).split(". See full")[0].strip()) from None
    as_stored = all(arrays[name].dtype.name == dtype for name, (dtype, _) in stored.items())
    shapes = {name: shape for name, (_, shape) in stored.items()}
    if as_stored and fingerprint(arrays, shapes) != about["fingerprint"]:
        raise _damaged(folder, "its arrays are not those that were written")
    return arrays


def _check_arrays(
    folder: Path, stored: Mapping[str, tuple], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
        return len(shape) == len(target) and all(a <= b for a, b in zip(shape, target, strict=True))

    problems = [f"missing: {name} {target.shape}" for name, target in wanted.items() if name not in stored]
    problems += [f"unexpected: {name} {shape}" for name, (_, shape) in stored.items() if name not in wanted]
    problems += [
        f"wrong shape: {name} is {stored[name][1]}, not {target.shape}"
        for name, target in wanted.items()
        if name in stored and not fits(stored[name][1], target.shape)
    ]
    if problems:
        raise ValueError(
            f"{folder} has other arrays than this version of retro-jax expects, {len(problems)} problems: "
            + "; ".join(problems[:8])
        )


class _Failed(RuntimeError):
    """What went wrong within orbax, by its first cause; `number` is the operating system's, if any."""

    def __init__(self, error: BaseException):
        while error.__cause__ is not None:
            error = error.__cause__
        super().__init__(str(error))
        told = re.search(r"os_error_code='(\d+)'", str(error))
        self.number = int(told[1]) if told else getattr(error, "errno", None)


def _by_orbax[T](do: Callable[[Any], T], arrays: Mapping[str, Any], *objects: str) -> T:
    """What is done by orbax's checkpointer, which prints nothing meanwhile.

    Args:
        do: takes the checkpointer.
        arrays: or their shapes; on its way between disk and devices, little more than the largest is held.
        *objects: names of the JSON objects besides `about`.

    Raises:
        _Failed: something went wrong.
    """
    import orbax.checkpoint as ocp

    largest = max(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    gigabytes = 1 + largest // 10**9
    handlers = {
        name: ocp.JsonCheckpointHandler(_object_file(Path(), name).name) for name in (_ABOUT, *objects)
    }
    handlers[_ARRAYS] = ocp.PyTreeCheckpointHandler(
        use_compression=False, save_device_host_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes
    )
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            try:
                return do(checkpointer)
            except Exception as error:  # there are many kinds
                if isinstance(error, MemoryError):
                    raise
                failed = _Failed(error)
        gc.collect()  # of coroutines that failed too, which would be told of when they are dropped
        raise failed
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _remove(folder: Path) -> None:
    """Removes a folder that threads left behind by orbax may still make, and write into, for a while."""
    quiet = 0
    for _ in range(200):
        quiet = 0 if folder.exists() else quiet + 1
        if quiet == 15:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _object_file(folder: Path, name: str) -> Path:
    return folder / name / f"{name}.json"


def _about_file(folder: Path) -> Path:
    return _object_file(folder, _ABOUT)


def _unfinished(folder: Path) -> Path | None:
    """What orbax has left of a folder that it did not finish, if anything."""
    beside = folder.with_name(folder.name + _UNFINISHED) if folder.name else folder
    if not folder.exists() and beside.is_dir():
        return beside
    if _UNFINISHED in folder.name and folder.is_dir():
        return folder
    return next(iter(folder.glob(f"*{_UNFINISHED}*")), None)


def _damaged(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is damaged ({reason}); copy or write it again")
