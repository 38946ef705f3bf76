"""A window that revises past queries in the lower layers only."""

import functools
import itertools

import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import KEYS
from retro_jax import models
from tests.retro_jax.tiny import ATOL, begin, force, tiny, token_ids

LENGTHS, STEPS, DENSE, LAYERS, CUT = (30, 47), 24, 1, 5, 3
"""Of the sparse layers 1 to 4 the lower half are 1 and 2."""


def config(**fields) -> rj.DecodeConfig:
    fields = {"method": "retro", "window": 3, "page_size": 4, "budget_tokens": 12} | fields
    return rj.DecodeConfig(dense_layers=DENSE, sink_pages=0, **fields)


@functools.cache
def decoded(used: rj.DecodeConfig):
    """Each step's logits, and the pages of each layer after it."""
    model, tokens, pages = tiny(2, LAYERS), token_ids(2, 80), []
    state, _ = begin(model, used, tokens, LENGTHS, 80)
    state, logits = force(
        model, used, state, tokens, STEPS, lambda s: pages.append([np.asarray(x.pages) for x in s.layers])
    )
    return state, logits, pages


def rewritten(pages, layer: int) -> bool:
    """Whether some step has changed keys that an earlier one wrote."""
    keys = [step[layer][:, :, :, KEYS].reshape(len(LENGTHS), 2, -1, 16) for step in pages]
    for before, after in itertools.pairwise(keys):
        written = np.abs(before).max((1, 3)) > 0
        if np.any(np.abs(after - before).max((1, 3)) * written > 0):
            return True
    return False


def test_lower_layers_do_as_in_the_paper_and_upper_ones_as_quest():
    paper, half = decoded(config()), decoded(config(revised_layers=0.5))
    for layer in range(CUT):
        for ours, theirs in zip(half[2], paper[2], strict=True):
            np.testing.assert_allclose(ours[layer], theirs[layer], atol=ATOL)
    # The first sparse layer revises outputs, of which its own keys do not depend.
    assert [rewritten(half[2], layer) for layer in range(LAYERS)] == [False, False, True, False, False]
    assert [rewritten(paper[2], layer) for layer in range(LAYERS)] == [False, False, True, True, True]
    np.testing.assert_allclose(half[0].hidden, paper[0].hidden, atol=ATOL)
    assert np.abs(half[1] - paper[1]).max() > 1e-3
    assert np.abs(half[1] - decoded(config(method="quest", window=None))[1]).max() > 1e-3


def test_revising_in_the_first_sparse_layer_alone_is_quest():
    """What it corrects reaches the newest query through what layers above rewrite, which do not."""
    quest = decoded(config(method="quest", window=None))
    first = decoded(config(revised_layers=0.25))
    np.testing.assert_allclose(first[1], quest[1], atol=ATOL)


def test_with_a_budget_of_all_pages_it_is_full_attention():
    model, tokens = tiny(2, LAYERS), token_ids(2, 80)
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    logits = decoded(config(budget_tokens=80, revised_layers=0.5))[1]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], expected[row, length : length + STEPS], atol=ATOL)


def test_past_queries_attend_to_more_pages_in_the_layers_that_revise():
    paper, half = (decoded(config(**fields))[0].metrics for fields in ({}, {"revised_layers": 0.5}))
    np.testing.assert_allclose(half.pages_attended[:, 0], paper.pages_attended[:, 0], atol=1)
    assert np.all(half.pages_attended[:, 1:] < paper.pages_attended[:, 1:])
    assert np.all(half.pages_attended[:, 1:] > 0)


@pytest.mark.parametrize("share", (0.0, -0.5, 1.5, float("nan")))
def test_shares_beyond_their_range_are_refused(share):
    with pytest.raises(ValueError, match=r"revised_layers .* within 0\.\.1.*window of 1"):
        config(revised_layers=share)


@pytest.mark.parametrize("fields", ({"method": "quest", "window": None}, {"window": 1}))
def test_without_a_window_there_is_nothing_to_confine(fields):
    with pytest.raises(ValueError, match=r"revised_layers 0\.5 .* window of 1, .* wider window"):
        config(revised_layers=0.5, **fields)
