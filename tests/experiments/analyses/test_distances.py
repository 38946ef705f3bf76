"""Distances from full attention: what must be zero, what a window may change, and what the command writes."""

import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import KEYS, VALUES
from retro_jax.experiments.analyses import distances
from retro_jax.experiments.analyses.window import cached, full_attention, relative_distance
from retro_jax.experiments.io.text import Texts
from tests.retro_jax.tiny import begin, force, tiny, token_ids

PROMPT, TOKENS, DENSE, AGES, WINDOW = 40, 64, 1, (0, 1, 2, 6), 3
QUERIES = TOKENS - PROMPT - AGES[-1]


def measure(method, budget_tokens=24, **fields):
    model, texts = tiny(), Texts(["a", "b"], token_ids(2, TOKENS), PROMPT)
    config = rj.DecodeConfig(
        method, budget_tokens=budget_tokens, page_size=4, dense_layers=DENSE, sink_pages=1, **fields
    )
    full = distances.full_attentions(model, texts, range(DENSE, model.config.num_layers))
    return distances.measure(model, texts, config, full, AGES, lambda *_: None)


@pytest.fixture(scope="module")
def quest():
    return measure("quest")


@pytest.fixture(scope="module")
def retro():
    return measure("retro", window=WINDOW)


def test_with_a_budget_of_all_pages_nothing_is_off():
    found = measure("retro", TOKENS, window=WINDOW)
    assert found.keys.shape == (len(AGES), 2, 2, QUERIES) and found.outputs.shape == (WINDOW, 2, 2, QUERIES)
    for values, expected in ((found.keys, 0), (found.values, 0), (found.outputs, 0), (found.cosine, 1)):
        np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(found.norm, 1, atol=1e-5)


def test_without_a_window_no_age_changes_anything(quest):
    for values in (quest.keys, quest.values):
        np.testing.assert_array_equal(values, values[:1].repeat(len(AGES), 0))
        assert values[:, 0].max() < 1e-5  # below the first sparse layer everything is dense
        assert values[:, 1].min() > 1e-3
    assert len(quest.outputs) == 1 and quest.outputs.mean() > 0.05
    np.testing.assert_allclose(quest.cosine, 1, atol=1e-6)


def test_a_window_changes_the_cache_until_it_has_passed_and_queries_above_the_first_layer(retro):
    for values in (retro.keys, retro.values):
        assert (values[1, 1] != values[0, 1]).mean() > 0.5 and (values[2, 1] != values[1, 1]).mean() > 0.5
        np.testing.assert_array_equal(values[3], values[2])
        assert values[:, 0].max() < 1e-5
        assert values[3, 1].mean() < 0.95 * values[0, 1].mean()
    assert retro.outputs[2].mean() < 0.95 * retro.outputs[0].mean()
    np.testing.assert_allclose(retro.cosine[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(retro.cosine[0], 1, atol=1e-6)
    assert retro.cosine[1:, 1].max() < 1 - 1e-7 and np.abs(retro.norm[1:, 1] - 1).min() > 0


def test_what_was_rectified_is_at_no_distance():
    found = measure("quest", rectify_every=2)
    for values in (found.keys[:, 1], found.values[:, 1]):  # every other token waits for a step
        assert values[1:].max() < 1e-5 and values[0, :, 1::2].max() < 1e-5 < values[0, :, ::2].min()
    assert found.outputs.mean() > 0.05  # those of sparse attention


def test_distances_are_those_of_decode_states(retro):
    model, tokens, steps = tiny(), token_ids(2, TOKENS), []
    config = rj.DecodeConfig(
        "retro", window=WINDOW, budget_tokens=24, page_size=4, dense_layers=DENSE, sink_pages=1
    )
    full = full_attention(model.params, model.config, tokens)

    def observe(state):
        newest = int(state.length[0]) - 1
        at = np.array([newest - age for age in AGES])
        layers = list(enumerate(state.layers))[DENSE:]
        steps.append((
            [relative_distance(cached(layer.pages, at, KEYS), full.k[i][:, at]) for i, layer in layers],
            [relative_distance(cached(layer.pages, at, VALUES), full.v[i][:, at]) for i, layer in layers],
            [
                relative_distance(layer.outputs.o[:, ::-1], full.o[i][:, newest - np.arange(WINDOW - 1)])
                for i, layer in layers
            ],
        ))  # fmt: skip

    state, _ = begin(model, config, tokens, [PROMPT] * 2, TOKENS)
    force(model, config, state, tokens, TOKENS - PROMPT, observe)
    for part, values, ages in ((0, retro.keys, AGES), (1, retro.values, AGES), (2, retro.outputs, range(2))):
        seen = np.array([step[part] for step in steps])  # [steps, L, B, ages]
        for place, age in enumerate(ages):
            expected = np.moveaxis(seen[age : age + QUERIES, ..., place], 0, -1)
            np.testing.assert_allclose(values[place], expected, atol=1e-5)


FLAGS = ("--prompt-tokens", 20, "--budgets", 48, "--page-size", 8, "--ages", 0, 1, 2, 4)


@pytest.fixture
def long_ids_file(tmp_path):
    """A random text of 160 tokens for random:tiny (512 ids)."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(512, size=(1, 160)))
    return tmp_path / "ids.npy"


def test_command(json_command, failure, long_ids_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    common = ("distances", "random:tiny", "--token-ids", long_ids_file, "--out", out, *FLAGS)
    arguments = (*common, "--presets", "quest", "--windows", 1, 3, "--tokens")
    values = json_command(*arguments, 160)
    assert list(values["cases"]) == ["quest-w1-s0-b48", "quest-w3-s0-b48"]
    none, window = values["cases"].values()
    assert none["of_no_window"] is None and (none["window"], window["window"]) == (1, 3)
    settled, before = (case["keys"][-1]["mean"] for case in (window, none))
    assert window["of_no_window"]["keys"]["mean"] == pytest.approx(settled / before)
    assert [point["age"] for point in window["keys"]] == [0, 1, 2, 4]
    assert [point["age"] for point in window["cosine"]] == [0, 1, 2]
    for point in window["values"]:
        assert point["mean"] == pytest.approx(np.mean([layer["mean"] for layer in point["layers"]]))
    assert (out / "distances.png").read_bytes()[:4] == b"\x89PNG"
    assert "| quest-w3-s0-b48 |" in (out / "table.md").read_text()

    monkeypatch.setattr(distances, "measure", None)  # what is finished is not decoded again
    monkeypatch.setattr(distances, "distances_pictures", lambda values: {})
    assert json_command(*arguments, 160) == values
    different = failure(*arguments, 159)
    assert "holds another measurement of distances (tokens 160, not 159; token_ids" in different
    (out / "cases" / "quest-w1-s0-b48.npz").write_bytes(b"PK")
    assert "is damaged" in failure(*arguments, 160)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ages", 1, 2), "--ages are 1 2; they must ascend from 0"),
        (("--ages", 0, 2, 2), "--ages are 0 2 2; they must ascend from 0"),
        (("--windows", 6), "--ages end at 4, before a window of 6 has passed a token; add 5"),
        (("--windows", 0), "window 0 is below 1"),
        (("--budgets", 8), "budget_tokens 8 is below"),
        (("--tokens", 151), "151 tokens less a prompt of 20 and the highest age, 4, are below 128"),
        (("--dense-layers", 4), "all 4 layers are dense; lower --dense-layers"),
    ],
)
def test_refused(failure, long_ids_file, tmp_path, flags, message):
    common = ("--token-ids", long_ids_file, "--tokens", 160, "--out", tmp_path / "out", *FLAGS)
    assert message in failure("distances", "random:tiny", *common, *flags)
    assert not (tmp_path / "out").exists()
