"""What pictures are made of: looks, files and words."""

import numpy as np

from retro_jax.experiments.pictures.files import pictures
from retro_jax.experiments.pictures.panels import COLOURS, Curves, Line, Look, Scale, looks
from retro_jax.experiments.pictures.words import listed, plain, shortened, wrapped


def test_a_hundred_looks_differ():
    found = looks([*map(str, range(100)), "Quest", "7"], {"Quest": Look("#222222")})
    assert len(set(found.values())) == len(found) == 101
    assert found["Quest"].colour == "#222222" and found["0"].colour == COLOURS[0]


def test_no_picture_without_a_point():
    line = Line("a", Look("k"), [1.0, 2.0], [np.nan, np.inf])
    assert pictures("p", [Curves([line], Scale("x"), Scale("y"))], "t", ["n = 0"]) == {}
    assert pictures("p", [], "t", ["n = 0"]) == {}


def test_a_picture_is_a_png_file():
    line = Line("a", Look("k"), [1.0, 2.0], [1.0, 2.0], [None, 1.5], [None, 2.5])
    (found,) = pictures("p", [Curves([line], Scale("x"), Scale("y"))], "t", ["n = 2"]).values()
    assert found[:8] == b"\x89PNG\r\n\x1a\n"


def test_words():
    assert shortened("a b", 3) == "a b" and shortened("/a/long/path/name", 10) == "/a/…h/name"
    assert listed(["a", "b"]) == "a, b" and listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert [plain(value) for value in (131072.0, 0.02, 16.777216, 1e6)] == [
        "131072",
        "0.02",
        "16.78",
        "1000000",
    ]
    assert wrapped("word " * 9, 0.7, 9).split() == ["word"] * 9
    assert max(map(len, wrapped("word " * 9, 0.7, 9).split("\n"))) == len("word word")
    assert "".join(wrapped("w" * 50, 1.0, 9).split("\n")) == "w" * 50
