"""The comparisons of generated tokens: where rounding decides two programs may part, and nowhere else."""

import jax
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.sampling import sequence_keys
from tests.retro_jax import tiny as small
from tests.retro_jax.tiny import assert_decided, assert_same_tokens, tiny, token_ids

CONFIG = rj.DecodeConfig(page_size=8, budget_tokens=24, dense_layers=1, prefill_chunk=16)


@pytest.mark.parametrize("sampling", (None, rj.Sampling(temperature=1.0, seed=3)))
def test_tokens_may_part_where_rounding_decides_only(sampling, monkeypatch):
    model, prompt = tiny(3), token_ids(1, 9)[0]
    key = sequence_keys(sampling, 1)[0] if sampling else None
    options = {"stop_tokens": []} | ({"sampling": sampling} if sampling else {})
    tokens = rj.generate(model, [prompt.tolist()], CONFIG, 4, **options).tokens[0]
    assert_same_tokens(model, CONFIG, prompt, tokens, tokens, sampling, key)
    for place in (0, 3):
        other = list(tokens)
        other[place] = (other[place] + 1) % small.VOCAB
        with pytest.raises(AssertionError):
            assert_same_tokens(model, CONFIG, prompt, other, tokens, sampling, key)
        with pytest.raises(AssertionError):
            assert_same_tokens(model, CONFIG, prompt, tokens, other, sampling, key)
        gap = _gap(model, prompt, tokens, other, place, sampling, key)
        for tolerance, same in ((0.51 * gap, True), (0.49 * gap, False)):
            monkeypatch.setattr(small, "ATOL", tolerance)
            if same:
                assert_same_tokens(model, CONFIG, prompt, other, tokens, sampling, key)
            else:
                with pytest.raises(AssertionError):
                    assert_same_tokens(model, CONFIG, prompt, other, tokens, sampling, key)
        monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_tokens(model, CONFIG, prompt, tokens[:-1], tokens, sampling, key)


def _gap(model, prompt, tokens, other, place, sampling, key):
    """How far the other token's score lies below the best, as the drawn token's is."""
    text = np.concatenate([prompt, tokens])[None].astype(np.int32)
    state, logits = small.begin(model, CONFIG, text, [9], text.shape[1])
    if place:
        logits = small.force(model, CONFIG, state, text, place)[1][-1]
    scores = np.asarray(logits[0])
    if sampling:
        scores = scores + np.asarray(jax.random.gumbel(jax.random.fold_in(key, 9 + place), scores.shape))
    assert scores.argmax() == tokens[place]  # the noise is the one that was drawn by
    return scores.max() - scores[other[place]]


def test_a_near_tie_is_not_decided():
    assert_decided([[0.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    with pytest.raises(AssertionError):
        assert_decided([[0.0, 1.0, 3.0], [3.0, 1.0, 3.0 + 1e-6]])
