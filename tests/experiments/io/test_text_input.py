import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from retro_jax.experiments.io.text import digest, file_tokens, read_text, read_tokens, text_tokens

WORDS = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()])
MODEL = SimpleNamespace(tokenizer=WORDS, config=SimpleNamespace(name="words"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Call me Ishmael. Some years ago")
    return path


def test_reads_part_of_a_text(text):
    assert read_text(text, skip_chars=5, chars=2) == "me"


@pytest.mark.parametrize(
    ("contents", "skip", "message"),
    [
        (None, 0, "there is no file"),
        (b"ab\ncaf\xe9 noir", 0, r"is not UTF-8: byte 0xe9 at offset 6, line 2.*save it as UTF-8.*iconv"),
        (b"\xef\xbb\xbf\xff", 0, "is not UTF-8: byte 0xff at offset 3, line 1"),
        (b"\xff\xfea\0b", 0, "is not UTF-16: byte 0x62 at offset 4"),
        (b"a\0b\0", 0, "NUL character at offset 1, so it is no text, or UTF-16 without"),
        (gzip.compress(b"abc", mtime=0), 0, "is a gzip file, no text; unpack"),
        (b"PK\x03\x04abc", 0, "is a zip file"),
        (b"", 0, "no text after its first 0 of 0 characters"),
        (b"\xef\xbb\xbf", 0, "no text after its first 0 of 0 characters"),
        (b"   \n", 0, "no text after its first 0 of 4 characters"),
        (b"abc", 7, "no text after its first 7 of 3 characters"),
        (b"abc", -1, "--skip-chars is -1"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, contents, skip, message):
    path = tmp_path / "text.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_text(path, skip)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        read_text(tmp_path)


@pytest.mark.parametrize("chars", [0, -5])
def test_no_characters_of_a_text(text, chars):
    with pytest.raises(ValueError, match=f"--prompt-chars is {chars}; it must be 1 or more"):
        read_text(text, chars=chars)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_as_programs_save_it(tmp_path, encoding, end):
    path, wanted = tmp_path / "text.txt", "Zo\u00eb \u2014 \U0001f600\n\nthe end\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + wanted.replace("\n", end)).encode(encoding))
    assert read_text(path) == wanted
    assert read_text(path, skip_chars=1, chars=2) == "o\u00eb"


def test_text_from_a_pipe():
    read, write = os.pipe()
    os.write(write, b"from a pipe")
    os.close(write)
    try:
        assert read_text(Path(f"/dev/fd/{read}")) == "from a pipe"
    finally:
        os.close(read)


def test_tokens_of_texts(text, tmp_path):
    longer = tmp_path / "longer.txt"
    longer.write_text("one three five seven nine eleven thirteen")
    assert text_tokens(MODEL, [text, longer], 3).tolist() == [[4, 2, 8], [3, 5, 4]]
    assert text_tokens(MODEL, [text, longer], None).shape == (2, 6)


def test_short_text_names_both_numbers(text):
    with pytest.raises(ValueError, match="has 6 tokens, fewer than the 7 asked for"):
        text_tokens(MODEL, [text], 7)


def test_text_needs_a_tokenizer(text):
    model = SimpleNamespace(tokenizer=None, config=SimpleNamespace(name="random:tiny"))
    with pytest.raises(ValueError, match=r"random:tiny has no tokenizer.*--token-ids"):
        text_tokens(model, [text], 2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), "holds float32; token ids must be one integer array"),
        (np.zeros((2, 2, 2), np.int32), r"has shape \(2, 2, 2\)"),
        (np.zeros((0,), np.int32), r"has shape \(0,\)"),
        (np.zeros((2, 5), np.int32), "has 5 tokens, fewer than the 8 asked for"),
    ],
)
def test_arrays_that_are_no_token_ids(tmp_path, array, message):
    path = tmp_path / "ids.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=message):
        file_tokens(path, 8)


def test_files_that_are_no_arrays(tmp_path, text):
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        file_tokens(text, None)
    np.savez(tmp_path / "several.npz", a=np.zeros(3, int))
    with pytest.raises(ValueError, match="holds several arrays"):
        file_tokens(tmp_path / "several.npz", None)


def test_one_source_of_tokens(text, tmp_path):
    for texts, token_ids in ([], None), ([text], tmp_path / "ids.npy"):
        with pytest.raises(ValueError, match="pass either --text"):
            read_tokens(MODEL, texts, token_ids, None)


def test_names_tell_texts_apart(text, tmp_path):
    other = tmp_path / "more" / "text.txt"
    other.parent.mkdir()
    other.write_text("five words and no more")
    assert read_tokens(MODEL, [text], None, 2)[1] == ["text"]
    assert read_tokens(MODEL, [text, other], None, 2)[1] == [str(text), str(other)]


def test_digest_depends_on_values_and_shape():
    ids = np.arange(6)
    assert digest(ids.astype(np.int32)) == digest(ids)
    assert len({digest(ids), digest(ids[::-1]), digest(ids.reshape(2, 3))}) == 3
