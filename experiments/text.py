"""Token ids to measure on, from text files or from `.npy` files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from models import Model


def read_text(path: Path, skip_chars: int = 0, chars: int | None = None) -> str:
    """Reads a UTF-8 text file, without its first `skip_chars` characters, at most `chars` of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, or nothing is left of it.
    """
    if skip_chars < 0:
        raise ValueError(f"--skip-chars is {skip_chars}; it must be 0 or more")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a UTF-8 text file (byte {error.start}); convert it to UTF-8"
        ) from None
    kept = text[skip_chars:] if chars is None else text[skip_chars : skip_chars + chars]
    if not kept.strip():
        raise ValueError(f"{path} has no text after its first {skip_chars} of {len(text)} characters")
    return kept


def text_tokens(
    model: "Model", paths: Sequence[Path], tokens: int | None, skip_chars: int = 0
) -> Int[np.ndarray, "B T"]:
    """Returns the first `tokens` token ids of each text file, one row per file.

    Args:
        model: its tokenizer is used.
        paths: text files.
        tokens: the length T of each row; None: as many as the shortest file has.
        skip_chars: characters left out at the start of every file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model has no tokenizer, or a text is shorter than `tokens`.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{model.config.name} has no tokenizer, so it cannot read text; pass --token-ids FILE.npy"
        )
    rows = [model.tokenizer.encode(read_text(path, skip_chars)) for path in paths]
    length = min(map(len, rows)) if tokens is None else tokens
    for path, row in zip(paths, rows, strict=True):
        _check_length(path, len(row), length)
    return np.array([row[:length] for row in rows], np.int32)


def file_tokens(path: Path, tokens: int | None) -> Int[np.ndarray, "B T"]:
    """Returns the first `tokens` ids of each row of a `.npy` file of integers, shape (T,) or (B, T).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such array, or has fewer than `tokens` ids in a row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is not a .npy file of numbers ({error}); write it with numpy.save"
        ) from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{path} holds {getattr(ids, 'dtype', 'several arrays')}; token ids must be one integer array"
        )
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise ValueError(f"{path} has shape {ids.shape}; token ids have shape (tokens,) or (texts, tokens)")
    ids = np.atleast_2d(ids)
    length = ids.shape[1] if tokens is None else tokens
    _check_length(path, ids.shape[1], length)
    return ids[:, :length]


def read_tokens(
    model: "Model", texts: Sequence[Path], token_ids: Path | None, tokens: int | None, skip_chars: int = 0
) -> tuple[Int[np.ndarray, "B T"], list[str]]:
    """Returns token ids and a name for each row, from text files or else from one `.npy` file.

    Raises:
        FileNotFoundError: see `check_sources`.
        ValueError: see `check_sources`, `text_tokens` and `file_tokens`.
    """
    check_sources(texts, token_ids, tokens)
    if token_ids is None:
        return text_tokens(model, texts, tokens, skip_chars), _names(texts)
    ids = file_tokens(token_ids, tokens)
    names = [token_ids.stem] if len(ids) == 1 else [f"{token_ids.stem}[{row}]" for row in range(len(ids))]
    return ids, names


def check_sources(texts: Sequence[Path], token_ids: Path | None, tokens: int | None) -> None:
    """Checks what can be told of texts before a model is read.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: there are not either texts or token ids, or `tokens` is below 1.
    """
    if bool(texts) == (token_ids is not None):
        raise ValueError("pass either --text FILE (one or more) or --token-ids FILE.npy")
    if tokens is not None and tokens < 1:
        raise ValueError(f"--tokens is {tokens}; it must be 1 or more")
    for path in texts or (token_ids,):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")


def digest(ids: Int[np.ndarray, "..."]) -> str:
    """Returns a short hash that tells whether two arrays of token ids are the same."""
    contents = np.ascontiguousarray(ids, np.int64).tobytes()
    return hashlib.sha256(repr(ids.shape).encode() + contents).hexdigest()[:16]


def _check_length(path: Path, available: int, wanted: int) -> None:
    if available < wanted:
        raise ValueError(f"{path} has {available} tokens, fewer than the {wanted} asked for; lower --tokens")


def _names(paths: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
