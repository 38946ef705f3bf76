import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.analyses.overlap import RANKS, measure
from retro_jax.experiments.io.text import Texts
from tests.retro_jax.tiny import begin, first_sparse_qkv, force, tiny, token_ids

PROMPT, TOKENS, DISTANCES, PAGE = 30, 70, 3, 4
CONFIG = DecodeConfig("quest", page_size=PAGE, budget_tokens=24, dense_layers=1, sink_pages=1)


@pytest.fixture(scope="module")
def shares():
    texts = Texts(["a", "b"], token_ids(2, TOKENS), PROMPT)
    return measure(tiny(), texts, CONFIG, DISTANCES, lambda *_: None)


def shares_of(chosen, then):
    """[distances, B, T] of sets[T, B, K, P]; the first steps have too few before them."""
    count = chosen.sum(axis=(2, 3))
    found = [[(chosen[t] & then[t - d]).sum(axis=(1, 2)) for t in range(DISTANCES, len(chosen))]
             for d in range(1, DISTANCES + 1)]  # fmt: skip
    return np.swapaxes(np.array(found) / count[DISTANCES:], 1, 2)


def forced(pages):
    """Pages that are always loaded, [T, 1, 1, P]."""
    page, position = np.arange(pages), np.arange(PROMPT, TOKENS)[:, None]
    return ((page < 1) | (page == position // PAGE))[:, None, None]


def test_shares_of_the_first_sparse_layer_are_those_of_numpy(shares):
    model, ids = tiny(), token_ids(2, TOKENS)
    q, k, _ = (np.asarray(array) for array in first_sparse_qkv(model.params, model.config, ids, dense=1))
    pages = -(-TOKENS // PAGE)
    loaded, following = np.zeros((2, TOKENS - PROMPT, 2, 2, pages), bool)
    for step, position in enumerate(range(PROMPT, TOKENS)):
        for b in range(2):
            for head in range(2):
                heads = q[b, position].reshape(2, 2, 16)[head]  # the group's query heads
                scores = np.full(pages, -np.inf)
                for page in range(position // PAGE + 1):
                    keys = k[b, page * PAGE : min((page + 1) * PAGE, position + 1), head]
                    bounds = np.maximum(heads * keys.min(axis=0), heads * keys.max(axis=0)).sum(axis=-1)
                    scores[page] = bounds.mean()
                scores[[0, position // PAGE]] = np.inf
                best = np.argsort(-scores, kind="stable")
                loaded[step, b, head, best[:6]] = True
                following[step, b, head, [page for page in best[6:12] if scores[page] > -np.inf]] = True
    chosen = loaded & ~forced(pages)
    assert shares.loaded.shape == (DISTANCES, 2, 2, TOKENS - PROMPT - DISTANCES)
    np.testing.assert_allclose(shares.loaded[:, 0], shares_of(chosen, loaded), atol=1e-6)
    np.testing.assert_allclose(shares.next[:, 0], shares_of(chosen, following), atol=1e-6)
    assert 0.1 < shares.loaded.mean() < 0.95 and shares.next.mean() > 0.02


def test_loaded_pages_are_those_of_decode_steps(shares):
    model, ids, loaded = tiny(), token_ids(2, TOKENS), []

    def observe(state):
        newest = np.asarray(state.length)[:, None, None] - 1
        loaded.append([np.asarray(layer.last_loaded) == newest for layer in state.layers[1:]])

    state, _ = begin(model, CONFIG, ids, [PROMPT] * 2, TOKENS)
    force(model, CONFIG, state, ids, TOKENS - PROMPT, observe)
    for layer, sets in enumerate(np.swapaxes(loaded, 0, 1)):
        expected = shares_of(sets & ~forced(sets.shape[-1]), sets)
        np.testing.assert_allclose(shares.loaded[:, layer], expected, atol=1e-6)


def test_overlap(json_command, failure, ids_file, tmp_path):
    out = tmp_path / "out"
    flags = ("--tokens", 96, "--prompt-tokens", 32, "--budget-tokens", 32, "--page-size", 8)
    arguments = ("overlap", "random:tiny", "--token-ids", ids_file, *flags, "--out", out)
    values = json_command(*arguments, "--distances", 2)
    assert [row["distance"] for row in values["mean"]] == [1, 2]
    assert list(values["layers"]) == ["2", "3"]
    for rank in RANKS:
        layers = [rows[1][rank]["mean"] for rows in values["layers"].values()]
        assert values["mean"][1][rank]["mean"] == pytest.approx(np.mean(layers))
    assert (out / "overlap.png").read_bytes()[:4] == b"\x89PNG"
    assert "| steps before |" in (out / "table.md").read_text()
    assert "is not overwritten" in failure(*arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--distances", 64), "--distances is 64; it must be in 1..63 for 64 scored tokens"),
        (("--dense-layers", 4), "all 4 layers are dense; lower --dense-layers"),
        (("--sink-pages", 3, "--distances", 1), "only pages that are always loaded fit the budget"),
    ],
)
def test_overlap_refuses(failure, ids_file, flags, message):
    common = ("--tokens", 96, "--prompt-tokens", 32, "--budget-tokens", 32, "--page-size", 8)
    assert message in failure("overlap", "random:tiny", "--token-ids", ids_file, *common, *flags)
