"""Records from local files, or from the Hugging Face hub by name."""

import csv
import importlib
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from retro_jax.experiments.io.text import decode

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find(data: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that `data` names: itself, or those in the folder that match the first pattern that any does.

    Raises:
      FileNotFoundError: there is no such file or folder, or nothing in it matches.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise FileNotFoundError(f"there is no file or folder {data}; correct --task.data")
    for pattern in patterns:
        found = sorted(path for path in data.glob(pattern) if path.is_file())
        if found:
            return found
    raise FileNotFoundError(f"{data} has no file that matches {' or '.join(patterns)}; correct --task.data")


def fetch(repository: str, files: Sequence[str]) -> list[Path]:
    """Files of a data set on the hub, in Hugging Face's own cache.

    Raises:
      OSError: the hub cannot be reached and the cache does not have them, or the hub refuses.
      ValueError: one is a .parquet file, and what reads it is not installed.
    """
    import huggingface_hub

    for file in files:
        if file.endswith(".parquet"):
            _pyarrow(f"{repository}/{file}")
    try:
        return [
            Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")) for file in files
        ]
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise OSError(
            f"could not fetch the data set {repository!r} from the Hugging Face hub: {error} "
            "Check the network; run `hf auth login` for a gated one; or fetch it elsewhere and pass "
            "--task.data"
        ) from error


def records(path: Path, fields: Iterable[str], header: Sequence[str] | None = None) -> list[dict]:
    """The records of a .jsonl, .json (a list), .csv or .parquet file.

    Args:
      path: the file.
      fields: that every record must have.
      header: names of the columns of a CSV file without a first line that names them.

    Raises:
      ValueError: the file is none of these, is broken or empty, a record lacks a field, or a .parquet file
        needs pyarrow, which is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}; convert it")
    if path.suffix == ".parquet":
        found = _pyarrow(str(path)).read_table(path).to_pylist()
    else:
        found = parse(decode(path.read_bytes(), str(path)), path.suffix, str(path), header)
    if not found:
        raise ValueError(f"{path} has no records")
    for number, record in enumerate(found, 1):
        missing = [field for field in fields if not isinstance(record, dict) or record.get(field) is None]
        if missing:
            raise ValueError(f"{path}: record {number} has no {missing[0]!r}; is this the right file?")
    return found


def parse(text: str, suffix: str, name: str, header: Sequence[str] | None = None) -> list[dict]:
    """The records in the text of a .jsonl, .json or .csv file; `name` is for messages.

    Raises:
      ValueError: the text is broken.
    """
    if suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text), fieldnames=header))
        except csv.Error as error:
            raise ValueError(f"{name} is not CSV ({error}); is this the right file?") from None
    try:
        if suffix == ".json":
            found = json.loads(text)
            return found if isinstance(found, list) else [found]
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}); is this the right file?") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts where JSON strings need no escape
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} line {number} is not JSON ({error}); is this the right file?") from None
    return found


def zip_member(path: Path, member: str) -> str:
    """The text of a file in a zip archive.

    Raises:
      ValueError: the file is no zip archive or has no such member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return decode(archive.read(member), f"{path} {member}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is not a zip archive with {member} in it ({error})") from None


def _pyarrow(file: str) -> ModuleType:
    """The module that reads .parquet files, for data sets that the hub has in no other form."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"{file} is read by pyarrow (extra retro-jax[hub]), which is not installed: run `python -m pip "
            "install pyarrow`, or pass the data in another form with --task.data"
        ) from None
