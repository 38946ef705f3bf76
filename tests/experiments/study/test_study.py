"""Studies: what runs, how it is kept and shown; the committed tables are those of the committed data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.compare import comparison
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.estimates import estimate
from retro_jax.experiments.io.estimates import ratio as by_token
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.study import data, tables, variants
from retro_jax.experiments.study.command import Study
from retro_jax.experiments.study.picture import position_pictures
from retro_jax.experiments.study.variants import EXACT, PRESET, QUEST, SINK, rectified, revised

MEASURED = Path(__file__).resolve().parents[3] / "docs" / "results" / "two-models"
BUDGETS = (128.0, 256.0, 512.0, 0.15)
GOALS = {128: 0.4, 256: 0.4, 512: 0.6, 0.15: 0.6}


@pytest.fixture(scope="module")
def measured():
    return data.load(MEASURED)


def a_cell(domain="prose", blocks=8, **excess):
    """Two texts; excess of each variant at two budgets is a constant and noise that all share."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, blocks)) / 100
    results = [
        data.Result(name, budget, 1e6 * budget, value / budget + noise)
        for name, value in excess.items()
        for budget in (1.0, 2.0)
    ]
    return data.Cell("M", domain, ("a", "b"), 64 * blocks + 100, 100, "float32", 9e6, {}, noise + 3, results)


def test_the_committed_tables_are_those_of_the_committed_data(measured):
    page = tables.page(measured)
    assert page == (MEASURED / "tables.md").read_text()
    lines = {" ".join(line.split()) for line in page.splitlines()}
    first = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    for shown in (MEASURED / "README.md", MEASURED.parents[2] / "README.md"):
        rows = [line for line in shown.read_text().splitlines() if line.startswith("| ")]
        body = [line for line in rows if line.split("|")[1].strip() in first - {""}]
        assert len(body) > 10
        assert not [line for line in body if " ".join(line.split()) not in lines]


def test_the_preset_meets_its_goals_on_both_models_and_kinds_of_text(measured):
    shares = {
        (one.model, one.domain, budget): one.result(PRESET, budget).excess.mean()
        / one.result(QUEST, budget).excess.mean()
        for one in measured
        for budget in BUDGETS
    }
    assert len(shares) == 16
    assert not {key: share for key, share in shares.items() if share > GOALS[key[2]]}


def test_the_preset_reads_no_more_than_quest(measured):
    for one in measured:
        for budget in BUDGETS:
            assert one.result(PRESET, budget).kv_bytes <= one.result(QUEST, budget).kv_bytes


def test_every_variant_is_a_configuration_of_its_own():
    full = DecodeConfig("full", sink_pages=0)
    found = [replace(full, **fields, **budget_fields(128)) for fields in variants.variants().values()]
    assert len(set(found)) == len(found) > 20
    names = {QUEST, SINK, PRESET, QUEST + EXACT, revised(4), revised(4, sink=True), rectified(8)}
    assert names <= variants.variants().keys()


def test_every_variant_and_full_attention_have_rows_with_caches_of_8_bits():
    found = variants.every_variant()
    assert len(found) > 3 * len(variants.variants())
    full = DecodeConfig("full", sink_pages=0)
    by_fields = {name: replace(full, **fields, **budget_fields(128)) for name, fields in found.items()}
    assert len(set(by_fields.values())) == len(found)
    names = [name for name in found if name.startswith((f"{QUEST}, int8", f"{PRESET}, int8", "TOVA, int8"))]
    assert names == [
        f"{QUEST}, int8 cache", f"{QUEST}, int8 cache, equal bytes", f"{PRESET}, int8 cache, equal bytes",
        "TOVA, int8 cache",
    ]  # fmt: skip
    assert {by_fields[name].budget_covers for name in names[1:3]} == {"traffic"}


@pytest.mark.parametrize(("page_size", "channels"), ((8, 16), (16, 64)))
def test_a_learned_score_adds_the_row_of_its_pages_and_channels(tmp_path, page_size, channels):
    about = {"format": 1, "name": "M", "model": {}, "weights": ""}
    (tmp_path / "score.json").write_text(json.dumps(about | {"page_size": page_size, "channels": channels}))
    study = Study(models=("m",), learned=(tmp_path,), budgets=(128, 0.15), out=tmp_path)
    (learned,) = study._learned().values()
    configs = [DecodeConfig("full", sink_pages=0), *learned]
    runs = [Run(run_name(config), config, np.ones((2, 640)), None, 4.0, 1e6, 1.0, {}) for config in configs]
    about = {"texts": ["a", "b"], "tokens": 768, "prompt_tokens": 128, "dtype": "float32"}
    found = data.cell("M", "prose", about, runs)
    name = f"learned score, {channels} channels, pages of {page_size}"
    assert [(result.variant, result.budget) for result in found.results] == [(name, 0.15), (name, 128)]


@pytest.mark.parametrize(
    ("models", "channels", "words"),
    (
        (("m", "n"), 16, "--learned has 1 folders for 2 models"),
        (("m",), 6, "channels 6; a study has 16, 32, 64"),
    ),
)
def test_learned_scores_that_a_study_has_no_row_for(tmp_path, models, channels, words):
    about = {"format": 1, "name": "M", "model": {}, "weights": "", "page_size": 8, "channels": channels}
    (tmp_path / "score.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=words):
        Study(models=models, learned=(tmp_path,), out=tmp_path)._learned()


def test_full_attention_with_another_cache_stands_at_every_budget(tmp_path):
    flags = {"cache_dtype": ("int8",), "only": (PRESET,), "budgets": (128, 0.15), "out": tmp_path}
    configs = Study(**flags).configurations()
    assert len({run_name(config) for config in configs}) == len(configs) == 2 + 2 * 5
    exact = np.random.default_rng(0).normal(size=(2, 640))
    excess = {None: 0.0, "int8": 0.01}
    runs = [
        Run(run_name(config), config, exact + excess[config.cache_dtype], None, 4.0, 1e6, 1.0, {})
        for config in configs
    ]
    about = {"texts": ["a", "b"], "tokens": 768, "prompt_tokens": 128, "dtype": "float32"}
    found = data.cell("M", "prose", about, runs)
    assert found.budgets == [128, 0.15]
    for budget in found.budgets:
        row = found.result("full attention, int8 cache", budget)
        assert row.excess.mean() == pytest.approx(0.01)
    assert len(found.results) == 2 * 6
    table = tables.excess_table(found)
    assert "full attention, int8 cache" in table and f"{PRESET}, int8 cache, equal bytes" in table


def test_blocks_give_the_errors_that_tokens_give():
    rng = np.random.default_rng(1)
    quest, own = rng.normal(1.0, 1.0, (3, 640)), rng.normal(0.5, 1.0, (3, 640))
    blocks = [data.block_means(values) for values in (own, quest)]
    assert tables.blocks_estimate(blocks[0]).error == pytest.approx(estimate(own).error)
    expected, found = by_token(own, quest), by_token(*blocks, block=1)
    assert (found.mean, found.error) == pytest.approx((expected.mean, expected.error))


def test_tables_say_what_is_missed_stale_and_repaired():
    cell = a_cell(**{QUEST: 0.4, QUEST + EXACT: 0.1, revised(4): 0.3})
    split = tables.split_table([cell], 2.0).splitlines()
    values = [float(cell.split("±")[0]) for cell in split[2].split("|")[2:6]]
    noise = cell.results[0].excess.mean() - 0.4
    assert values == pytest.approx([0.2 + noise, 0.05 + noise, 0.15, 0.05], abs=1e-4)
    ratios = tables.ratio_table([cell, a_cell("code", **{QUEST: 0.4})], 1.0).splitlines()
    assert [line.split("|")[1].strip() for line in ratios[2:]] == [revised(4), QUEST + EXACT]
    assert ratios[2].split("|")[3].strip() == ""  # did not run on code
    paired = tables.paired_table([cell], revised(4), QUEST, 1.0).splitlines()[2]
    assert "-0.1000" in paired and "2 of 2" in paired


def test_saved_and_loaded(tmp_path):
    cell = a_cell(**{QUEST: 0.4, PRESET: 0.04})
    data.save(tmp_path / "new", [cell])
    (found,) = data.load(tmp_path / "new")
    assert (found.name, found.budgets, list(found.texts)) == ("M, prose", [2.0, 1.0], ["a", "b"])
    np.testing.assert_allclose(found.full, cell.full, rtol=1e-6)
    for own, other in zip(found.results, cell.results, strict=True):
        assert (own.variant, own.budget, own.kv_bytes) == (other.variant, other.budget, other.kv_bytes)
        np.testing.assert_allclose(own.excess, other.excess, rtol=1e-3, atol=1e-6)


def test_what_is_damaged_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no study"):
        data.load(tmp_path)
    data.save(tmp_path, [a_cell(**{QUEST: 0.4})])
    about = (tmp_path / data.ABOUT).read_text()
    data.save(tmp_path, [a_cell(**{QUEST: 0.4, PRESET: 0.1})])
    (tmp_path / data.ABOUT).write_text(about)
    with pytest.raises(
        ValueError, match=r"do not belong together \(2 runs and excess of shape \(4, 2, 8\)\)"
    ):
        data.load(tmp_path)


def test_the_picture_has_a_panel_for_each_cell_and_budget():
    cells = [a_cell(kind, 32, **{QUEST: 0.4, PRESET: 0.1}) for kind in ("prose", "code")]
    found = position_pictures(cells, [1.0, 2.0])
    assert list(found) == ["position.png"] and found["position.png"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--models", "random:tiny"), "--models and --domains belong together"),
        (("--models", "random:tiny", "--domains", "nowhere"), "neither a folder nor a .npy file"),
        (("--models", "random:tiny", "--domains", "a.npy", "b/a.npy"), "1 different names (a); rename one"),
        (("--models", "a/b", "c/b", "--domains", "a.npy"), "--models have 1 different names (b); rename one"),
        (("--models", "m", "--domains", "a.npy", "--only", "best"), "--only has 'best'"),
        (("--models", "m", "--domains", "a.npy"), "a.npy, which is neither a folder nor a .npy file"),
        (("--models", "m", "--domains", "."), "a folder without .txt files"),
        (
            ("--models", "m", "--domains", ".", "--tokens", 1100),
            "1100 tokens less a prompt of 1024 are below 128",
        ),
        (("--models", "m", "--domains", ".", "--budgets", 8), "budget_tokens 8 is below the"),
        ((), "holds no study"),
    ],
)
def test_refused(failure, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure("study", *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_kinds_of_text_and_again_without_models(json_command, tmp_path, monkeypatch):
    for seed, name in enumerate(("one", "two")):
        ids = np.random.default_rng(seed).integers(512, size=(2, 160))
        np.save(tmp_path / f"{name}.npy", ids)
    scored = []
    real = comparison.score

    def score(model, ids, configs, **rest):
        scored.append(configs[0].method)
        return real(model, ids, configs, **rest)

    monkeypatch.setattr(comparison, "score", score)
    out = tmp_path / "out"
    domains = ("--domains", tmp_path / "one.npy", tmp_path / "two.npy")
    flags = ("--tokens", 160, "--prompt-tokens", 32, "--budgets", 48, 48, "--only", QUEST)
    values = json_command("study", "--models", "random:tiny", *domains, *flags, "--out", out)
    assert scored == ["full", "quest"] * 2
    assert [(cell["model"], cell["domain"]) for cell in values["cells"]] == [
        ("random-tiny", "one"), ("random-tiny", "two")
    ]  # fmt: skip
    assert [run["variant"] for run in values["cells"][1]["runs"]] == [QUEST]
    report = (out / "tables.md").read_text()
    assert "## random-tiny, one" in report and "## random-tiny, two" in report
    cells = data.load(out)
    assert cells[0].full.mean() != cells[1].full.mean() and cells[0].full.shape == (2, 2)
    assert json_command("study", "--models", "random:tiny", *domains, *flags, "--out", out) == values
    assert json_command("study", "--out", out) == values
    assert len(scored) == 4 and (out / "tables.md").read_text() == report
    assert (out / "position.png").read_bytes()[:4] == b"\x89PNG"
