"""Token ids to measure on, from text files or from `.npy` files."""

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from retro_jax.models import Model

MARKS = {  # UTF-32's first, as one begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of encodings other than UTF-8."""
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh9": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF-": "PDF",
}
"""How files begin that have text in them, but are none."""


WITHOUT_TOKENIZER = ", so it cannot read text; pass --token-ids FILE.npy"
"""What a model without one is told."""


@dataclass(frozen=True)
class Texts:
    """Texts to decode along: their names and token ids, all of one length."""

    names: list[str]
    ids: Int[np.ndarray, "B T"]
    prompt_tokens: int

    def __post_init__(self):
        check_prompt(self.prompt_tokens, self.ids.shape[1])


def check_prompt(prompt_tokens: int, tokens: int) -> None:
    """Raises ValueError if so many of a text's tokens cannot be its prompt."""
    if not 1 <= prompt_tokens < tokens:
        raise ValueError(
            f"--prompt-tokens is {prompt_tokens}; it must be in 1..{tokens - 1} for {tokens} tokens"
        )


def decode(contents: bytes, name: str) -> str:
    """The text in a file: UTF-8, or UTF-16 or UTF-32 after a byte order mark.

    A byte order mark is no part of the text, and every line end (CR LF, CR) is read as LF, as Python reads
    files: the same text gives the same tokens whatever program saved it. Nothing else is changed, and no
    other encoding is guessed.

    Args:
        contents: the file's bytes.
        name: the file's, for messages.

    Raises:
        ValueError: the bytes are not of that encoding, or have a NUL character, which no text has.
    """
    for start, kind in PACKED.items():
        if contents.startswith(start):
            raise ValueError(f"{name} is a {kind} file, no text; unpack or convert it first")
    encoding = next((kind for mark, kind in MARKS.items() if contents.startswith(mark)), "UTF-8")
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        byte, line = contents[error.start], contents.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not {encoding}: byte 0x{byte:02x} at offset {error.start}, line {line}; "
            "save it as UTF-8, or convert it from what it is in, such as by `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{name} has a NUL character at offset {text.index(chr(0))}, so it is no text, or UTF-16 without "
            "a byte order mark; save it as UTF-8"
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, skip_chars: int = 0, chars: int | None = None) -> str:
    """Reads a text file (see `decode`), without its first `skip_chars` characters, at most `chars` of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no text, or nothing is left of it.
    """
    if skip_chars < 0:
        raise ValueError(f"--skip-chars is {skip_chars}; it must be 0 or more")
    if chars is not None and chars < 1:
        raise ValueError(f"--prompt-chars is {chars}; it must be 1 or more")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    text = decode(path.read_bytes(), str(path))
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
        raise ValueError(f"{model.config.name} has no tokenizer{WITHOUT_TOKENIZER}")
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
        return text_tokens(model, texts, tokens, skip_chars), text_names(texts)
    ids = file_tokens(token_ids, tokens)
    return ids, ids_names(token_ids, len(ids))


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


def ids_names(path: Path, rows: int) -> list[str]:
    """Returns what the texts in a file of token ids are called."""
    return [path.stem] if rows == 1 else [f"{path.stem}[{row}]" for row in range(rows)]


def _check_length(path: Path, available: int, wanted: int) -> None:
    if available < wanted:
        raise ValueError(f"{path} has {available} tokens, fewer than the {wanted} asked for; lower --tokens")


def text_names(paths: Sequence[Path]) -> list[str]:
    """Returns what texts from files are called."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
