"""Methods from outside the library."""

import dataclasses
import inspect
import re
import textwrap
from unittest import mock

import jaxtyping
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.fields import DecodeFields
from retro_jax.methods import METHODS
from tests.retro_jax.tiny import begin, force, tiny, token_ids


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    with mock.patch.dict(METHODS):
        yield


def test_the_example_decodes():
    code = re.search(r"\n\n((?: {8}.*\n|\n)+)", rj.register_method.__doc__)[1]
    names = {}
    exec(textwrap.dedent(code), names)
    assert names["config"].attention is names["STRIDED"] and not names["config"].attention.dense

    model, tokens = tiny(), token_ids(2, 90)
    config = dataclasses.replace(names["config"], page_size=4, budget_tokens=20, dense_layers=1)
    lengths = (50, 70)

    def observe(state):
        newest = np.asarray(state.length) - 1
        for layer in state.layers[1:]:
            loaded = np.asarray(layer.last_loaded) == newest[:, None, None]
            for row, position in enumerate(newest.tolist()):
                page = position // 4
                best = sorted(range(1, page), key=lambda p: -p if p % 4 == 0 else 0)[:3]
                assert [list(np.flatnonzero(head)) for head in loaded[row]] == [sorted([0, *best, page])] * 2

    force(model, config, begin(model, config, tokens, lengths, 90)[0], tokens, 4, observe)


def select(rules, layer, query, left):
    raise AssertionError("not called")


@pytest.mark.parametrize(
    ("method", "error", "message"),
    (
        ("quest", TypeError, "'quest' is a str; give a retro_jax.Method"),
        (rj.Method("tova", "x", "x"), ValueError, "method 'tova' is there already; use a name beside full, "),
    ),
)
def test_what_is_refused(method, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without the checks of tests
    before = dict(METHODS)
    with pytest.raises(error, match=message):
        rj.register_method(method)
    assert before == METHODS


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"name": "my method"}, "method name 'my method' is not a word of letters"),
        ({"scored": True, "select": None}, "method 'mine' selects no pages; leave scored and revises false"),
        ({"revises": True, "select": None}, "method 'mine' selects no pages"),
        ({"default_window": 2}, "default_window 2 of method 'mine' is not possible; use 1, or more"),
        ({"default_window": 0, "revises": True}, "default_window 0 of method 'mine' is not possible"),
    ),
)
def test_what_a_method_cannot_say_of_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.Method(**{"name": "mine", "title": "Mine", "help": "x", "select": select} | fields)


def test_a_method_checks_its_fields_and_errors_of_others_name_it():
    def check(fields):
        if fields.sink_pages:
            raise ValueError("mine has no sinks")

    rj.register_method(rj.Method("mine", "Mine", "x", select=select, scored=True, revises=True, check=check))
    assert rj.DecodeConfig("mine", sink_pages=0, window=3).slots == 3
    with pytest.raises(ValueError, match="mine has no sinks"):
        rj.DecodeConfig("mine")
    with pytest.raises(ValueError, match="use method 'retro' or 'mine' or window None"):
        rj.DecodeConfig("quest", window=2)
    with pytest.raises(ValueError, match="use method 'quest' or 'retro' or 'mine'"):
        rj.DecodeConfig("tova", residual_pages=2)


@pytest.mark.parametrize("joins", (True, False))
def test_an_eviction_rule_from_outside_leaves_pages_to_others_if_it_says_so(joins):
    rule = dataclasses.replace(METHODS["tova"].eviction, joins=joins)
    rj.register_method(rj.Method("mine", "Mine", "x", eviction=rule))
    assert rj.DecodeConfig("mine").eviction is rule and not rj.DecodeConfig("mine").attention.dense
    fields = {"method": "quest", "evict": "mine", "cache_tokens": 512}
    if joins:
        assert rj.DecodeConfig(**fields).eviction is rule
    else:
        with pytest.raises(ValueError, match="evict 'mine' is not possible; use one of tova, h2o"):
            rj.DecodeConfig(**fields)


def test_the_help_of_the_flag_is_what_the_methods_say():
    text = " ".join(inspect.getsource(DecodeFields).split())
    for method in METHODS.values():
        assert f'"{method.name}" ({method.help})' in text
