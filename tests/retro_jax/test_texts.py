"""Strings that end a text, and results that are gone on with without a prompt."""

import numpy as np
import pytest

import retro_jax as rj
from retro_jax.sampling import sequence_keys
from retro_jax.texts import Texts
from tests.retro_jax.tiny import tiny, token_ids

CONFIGS = {
    "retro": rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=24, dense_layers=1),
    "preset": rj.preset("mean-key", budget_tokens=64),
}


class Letters:
    """A tokenizer whose token i is the letter i; none ends a text."""

    stop_ids = ()

    def encode(self, text, add_bos=None):
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids)


MODEL = rj.Model(tiny(3, layers=2).config, tiny(3, layers=2).params, Letters())
SAMPLING = rj.Sampling(1.0, seed=2)


class Bytes:
    """A tokenizer whose tokens are these bytes."""

    pieces = (b"<end>", b"a", b"b", b"EN", b"D", b"xEND", b"E", b"\xc3", b"\xa9", b"NDy", b"\n", b" ")

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def run(tokens, stop, turn=()):
    """The text of tokens that come one by one after a turn, what was streamed, and how many came."""
    streamed = []
    texts = Texts(Bytes(), [list(turn)], [0], stop, lambda _, piece: streamed.append(piece))
    count = 0
    while count < len(tokens) and not texts.ended[0]:
        texts.append(np.array([tokens[count : count + 1]]), np.ones((1, 1), bool))
        count += 1
        assert texts.text(0).startswith("".join(streamed))  # nothing is taken back
    texts.flush()
    assert "".join(streamed) == texts.text(0)
    assert texts.tokens(0) == list(tokens[:count])
    return texts.text(0), streamed, count, texts.ended[0]


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "count"),
    (
        ((1, 3, 4, 2), ["END"], "a", 3),  # across two tokens
        ((1, 6, 9, 2), ["END"], "a", 3),  # that begin in one and go on past it in the next
        ((1, 5, 2), ["END"], "ax", 2),  # within one token
        ((3, 3, 4), ["END"], "EN", 3),  # its beginning comes up in vain first
        ((1, 3, 2, 1), ["END"], "aENba", 4),  # in vain only
        ((1, 3), ["END"], "aEN", 2),  # unfinished at the end
        ((1, 5, 2), ["D", "EN"], "ax", 2),  # several at once: the first in the text
        ((5, 2), ["xEND", "END"], "", 1),
        ((1, 0, 2), ["END"], "a", 2),  # a stop token ends too, and is no text
        ((1, 7, 8, 10, 2), ["\n"], "aé", 4),  # after a character of two tokens
        ((1, 7, 8, 2), ["é"], "a", 3),  # such a character itself
        ((1, 7), ["\n"], "a\ufffd", 2),  # an unfinished character at the end
        ((10, 10, 1), ["\n\n"], "", 2),
    ),
)
def test_a_text_ends_before_a_stop_string(tokens, stop, text, count):
    whole, _, taken, ended = run(tokens, stop)
    assert (whole, taken) == (text, count)
    assert ended == (any(string in Bytes().decode(tokens) for string in stop) or 0 in tokens)


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back():
    assert run((1, 3, 2, 1), ["END"])[1] == ["a", "ENb", "a"]
    assert run((1, 3, 4), ["END"])[1] == ["a"]
    assert run((1, 7, 8, 1), ["END"])[1] == ["a", "é", "a"]


@pytest.mark.parametrize(
    ("turn", "tokens", "stop", "text", "count"),
    (
        ((1, 3), (4, 2), ["END"], "", 1),  # begun before: what is out stays out
        ((1, 3, 4), (2, 1), ["END"], "", 0),  # ended before, as one longer call
        ((1, 3, 4), (2, 1), [], "ba", 2),  # which other strings would not have
        ((3, 4, 1), (2, 1), ["END"], "ba", 2),  # passed over by who asked before
        ((1, 7), (8, 2), [], "éb", 2),  # the rest of a character
        ((1, 0), (2,), [], "", 0),  # ended by a stop token
    ),
)
def test_a_text_that_goes_on(turn, tokens, stop, text, count):
    assert run(tokens, stop, turn)[::2] == (text, count)


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_that_go_on_without_a_prompt_are_one_longer_call(name):
    prompts, options = [row.tolist() for row in token_ids(2, 9)], {"sampling": SAMPLING, "stop_tokens": []}
    whole = rj.generate(MODEL, prompts, CONFIGS[name], 18, **options)
    string = whole.texts[0][6:8]
    part = rj.generate(MODEL, prompts, CONFIGS[name], 14, capacity=64, stop=[string], **options)
    ends = [text.find(string) + 2 if string in text[:14] else 14 for text in whole.texts]
    assert part.tokens == [tokens[:end] for tokens, end in zip(whole.tokens, ends, strict=True)]
    assert part.finished[0] and part.texts[0] == whole.texts[0][: ends[0] - 2]

    same = rj.generate(MODEL, None, CONFIGS[name], 3, stop=[string], previous=part, **options)
    assert same.tokens[0] == [] and same.texts[0] == "" and same.finished[0]  # a longer call ends there too
    on = rj.generate(MODEL, None, CONFIGS[name], 5, previous=same, **options)
    on = rj.generate(MODEL, [None, None], CONFIGS[name], 4, steps_per_call=3, previous=on, **options)
    longer = rj.generate(MODEL, prompts, CONFIGS[name], 30, **options)
    for row, tokens in enumerate(longer.tokens):
        assert on.turns[row] == tokens[: len(on.turns[row])]
    assert len(on.turns[0]) == ends[0] + 9
    assert on.texts[0] == longer.texts[0][ends[0] + 5 : ends[0] + 9]


def test_one_sequence_goes_on_and_another_gets_a_prompt():
    prompts, options = [row.tolist() for row in token_ids(2, 9)], {"stop_tokens": [], "capacity": 64}
    config = CONFIGS["preset"]
    whole = rj.generate(MODEL, prompts[:1], config, 12, **options)
    turns = rj.generate(MODEL, prompts[1:], config, 6, **options)
    turns = rj.generate(MODEL, ["abc"], config, 6, stop_tokens=[], previous=turns)
    both = rj.generate(MODEL, prompts, config, 6, **options)
    both = rj.generate(MODEL, [None, "abc"], config, 6, stop_tokens=[], previous=both)
    assert both.tokens == [whole.tokens[0][6:], turns.tokens[0]]
    assert both.turns == [whole.tokens[0], turns.tokens[0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"prompts": None}, ValueError, "a prompt is None; only a sequence of a previous result goes on"),
        ({"prompts": [[1], None]}, ValueError, "a prompt is None"),
        ({"stop": "END"}, TypeError, "stop must be a list of strings; put a single one in brackets"),
        ({"stop": ["a", ""]}, ValueError, r"stop has \['a', ''\]; give strings of at least one character"),
        (
            {"stop": ["a"], "model": tiny(3)},
            ValueError,
            "tiny-group-3 has no tokenizer to look for stop",
        ),
        ({"keys": sequence_keys(SAMPLING, 2)}, ValueError, r"keys has shape \(2,\), not \(1,\)"),
    ),
)
def test_errors(options, error, message):
    options = {"model": MODEL, "prompts": [[1]], "config": CONFIGS["retro"], "max_new_tokens": 4} | options
    with pytest.raises(error, match=message):
        rj.generate(**options)
