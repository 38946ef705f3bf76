from types import SimpleNamespace

import numpy as np
import pytest

from experiments.text import digest, file_tokens, read_text, read_tokens, text_tokens

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
        (b"\xff\xfe\x00", 0, r"not a UTF-8 text file \(byte 0\)"),
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
