import json
from unittest import mock

import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import SCORES, PageScore
from retro_jax import preset
from retro_jax.experiments.compare import comparison, ladder, tables
from retro_jax.experiments.compare import pictures as compare_plots
from retro_jax.experiments.compare.ladder import LADDER
from retro_jax.experiments.io.settings import run_name

SETTINGS = ("--tokens", 96, "--prompt-tokens", 24, "--budgets", 32, "--page-sizes", 8, "--windows", 1, 2)


@pytest.fixture
def scored(monkeypatch):
    """The configurations that were really run."""
    configs = []
    real = comparison.score

    def score(model, ids, own, **rest):
        assert len(own) == len(ids)
        config = own[0]
        configs.append((config.method, config.window, config.sink_pages))
        return real(model, ids, own, **rest)

    monkeypatch.setattr(comparison, "score", score)
    return configs


def run(json_command, ids_file, out, *more):
    return json_command("compare", "random:tiny", "--token-ids", ids_file, *SETTINGS, "--out", out, *more)


def test_compare(json_command, ids_file, tmp_path):
    out = tmp_path / "out"
    values = run(json_command, ids_file, out, "--no-overwrite")
    pooled = {row["run"]: row for row in values["pooled"]}
    assert list(pooled) == ["full", "quest-b32-p8", "retro-w2-b32-p8", "retro-w2-b32-p8-no_overwrite"]
    assert abs(pooled["quest-b32-p8"]["excess"]["mean"]) > 1e-4
    assert pooled["retro-w2-b32-p8"]["quest_difference"] > 1e-4
    assert pooled["retro-w2-b32-p8-no_overwrite"]["quest_difference"] < 1e-4  # float32 over other shapes
    per_text = [{row["run"]: row for row in values["per_text"][name]} for name in ("ids[0]", "ids[1]")]
    for name, row in pooled.items():
        assert row["nll"]["mean"] == pytest.approx(np.mean([text[name]["nll"]["mean"] for text in per_text]))

    exposures = {run["name"]: run["exposure"] for run in values["runs"]}
    assert exposures["quest-b32-p8"] == [1.0]
    assert 1.0 < exposures["retro-w2-b32-p8"][1] < 2.0
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "Retro (no overwriting)" in (out / "table.md").read_text()
    page = (out / "comparison.html").read_text()
    assert json.dumps(values, separators=(",", ":")) in page
    with np.load(out / "runs" / "full.npz") as arrays:
        assert arrays["nll"].shape == (2, 72)
        assert arrays["nll"].mean() == pytest.approx(pooled["full"]["nll"]["mean"])


def test_resume_runs_only_what_is_missing(json_command, ids_file, tmp_path, scored, monkeypatch):
    released = []
    monkeypatch.setattr(comparison, "release", lambda: released.append(len(scored)))
    out = tmp_path / "out"
    first = run(json_command, ids_file, out)
    assert scored == [("full", None, 0), ("quest", None, 1), ("retro", 2, 1)]
    assert released == [1, 2, 3]  # the programs of a sweep do not pile up
    scored.clear()
    (out / "runs" / "retro-w2-b32-p8.npz").unlink()
    second = run(json_command, ids_file, out)
    assert scored == [("retro", 2, 1)]
    assert second["pooled"] == first["pooled"]


def test_a_score_from_outside_is_compared(json_command, ids_file, tmp_path):
    twice = PageScore("twice_the_mean", ("mean_key",), lambda q: [2 * q])
    with mock.patch.dict(SCORES):
        rj.register_score(twice)
        more = ("--windows", 1, "--scores", "mean_key", "twice_the_mean")
        values = run(json_command, ids_file, tmp_path / "out", *more)
    pooled = {row["run"]: row["nll"] for row in values["pooled"]}
    assert list(pooled) == ["full", "quest-b32-p8-mean_key", "quest-b32-p8-twice_the_mean"]
    assert pooled["quest-b32-p8-twice_the_mean"] == pooled["quest-b32-p8-mean_key"] != pooled["full"]


def test_more_sink_pages_add_runs(json_command, ids_file, tmp_path, scored):
    out = tmp_path / "out"
    first = run(json_command, ids_file, out)
    scored.clear()
    second = run(json_command, ids_file, out, "--sink-pages", 0)
    assert scored == [("quest", None, 0), ("retro", 2, 0)]
    assert len(second["pooled"]) == 5
    assert all(row in second["pooled"] for row in first["pooled"])


def test_methods_scores_and_evictions_add_rows(json_command, ids_file, tmp_path, scored):
    out = tmp_path / "out"
    first = run(json_command, ids_file, out, "--cache-tokens", 48)
    scored.clear()
    more = ("--methods", "streaming", "--scores", "bounds", "oracle", "--evict", "tova")
    second = run(json_command, ids_file, out, "--cache-tokens", 48, *more)
    assert len(scored) == 7
    pooled = {row["run"]: row for row in second["pooled"]}
    assert list(pooled) == [
        "full",
        "quest-b32-p8",
        "retro-w2-b32-p8",
        "quest-b32-p8-oracle",
        "retro-w2-b32-p8-oracle",
        "quest-b32-p8-evict_tova",
        "retro-w2-b32-p8-evict_tova",
        "quest-b32-p8-evict_tova-oracle",
        "retro-w2-b32-p8-evict_tova-oracle",
        "streaming-b32-p8",
    ]
    assert all(row in second["pooled"] for row in first["pooled"])
    quest = pooled["quest-b32-p8"]["excess"]["mean"]
    for name, baseline in (("streaming-b32-p8", quest), ("quest-b32-p8-oracle", None)):
        row = pooled[name]
        assert row["ratio"]["mean"] == pytest.approx(
            row["excess"]["mean"] / (baseline or row["excess"]["mean"])
        )
    table = (out / "table.md").read_text()
    assert "StreamingLLM" in table and "Retro (TOVA evicts, oracle)" in table
    read = {entry["name"]: entry["kv_bytes_per_step"] for entry in second["runs"]}
    assert read["streaming-b32-p8"] < read["quest-b32-p8-evict_tova"] < read["quest-b32-p8"]
    assert read["quest-b32-p8"] < read["quest-b32-p8-oracle"]


def test_an_interrupted_run_leaves_the_finished_ones(
    json_command, command, ids_file, tmp_path, monkeypatch, scored
):
    out = tmp_path / "out"
    real = comparison.score

    def stops_at_retro(model, ids, config, **rest):
        if config[0].method == "retro":
            raise KeyboardInterrupt
        return real(model, ids, config, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "score", stops_at_retro)
        arguments = ("compare", "random:tiny", "--token-ids", ids_file, *SETTINGS, "--out", out)
        assert command(*arguments)[0] == 130
    assert sorted(file.name for file in (out / "runs").iterdir()) == ["full.npz", "quest-b32-p8.npz"]
    scored.clear()
    run(json_command, ids_file, out)
    assert scored == [("retro", 2, 1)]


def test_a_folder_of_other_settings_is_refused(json_command, failure, ids_file, tmp_path):
    out = tmp_path / "out"
    run(json_command, ids_file, out)
    before = (out / "results.json").read_text()
    arguments = ("compare", "random:tiny", "--token-ids", ids_file, *SETTINGS, "--out", out)
    line = failure(*arguments, "--prompt-tokens", 32, "--dense-layers", 1)
    assert "prompt_tokens 24, not 32; config.dense_layers 2, not 1" in line
    assert "choose another --out" in line
    assert (out / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bin-tokens", 0), "--bin-tokens is 0; it must be 1 or more"),
        (("--windows", 0), "window 0 is below 1"),
        (("--sink-pages", 4), "budget_tokens 32 is below the 5 pages of 8 tokens"),
        (("--presets", "best"), "preset 'best' is unknown; use one of quest, paper, mean-key"),
        (("--group-reduces", "best"), "group_reduce 'best' is unknown"),
        (("--scores", "best"), "'best' is unknown; use one of bounds, mean_key, learned, oracle, random"),
        (("--scores", "learned"), "--score learned needs --learned FOLDER, or a model that was written with"),
        (("--methods", "tova", "best"), "--methods has 'best'; use streaming, tova, h2o, snapkv"),
        (("--budgets", 32.5), "budget 32.5 is neither a share up to 1 nor a whole number of tokens"),
        (("--evict", "tova"), "cache_tokens None is below budget_tokens 32"),
        (("--methods", "snapkv"), "lower observation or raise the budget"),
    ],
)
def test_impossible_settings_are_refused_before_any_run(failure, ids_file, tmp_path, flags, message):
    arguments = ("compare", "random:tiny", "--token-ids", ids_file, *SETTINGS, "--out", tmp_path / "out")
    assert message in failure(*arguments, *flags)
    assert not (tmp_path / "out").exists()


def test_default_folder_depends_on_the_settings(json_command, ids_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("--tokens", 96, "--budgets", 32, "--page-sizes", 8, "--windows", 1)
    for prompt in (24, 40, 40):
        arguments = ("--token-ids", ids_file, *settings, "--prompt-tokens", prompt)
        json_command("compare", "random:tiny", *arguments)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    prompts = {json.loads((folder / "comparison.json").read_text())["prompt_tokens"] for folder in folders}
    assert prompts == {24, 40}


def test_a_sweep_over_budgets(json_command, ids_file, tmp_path, scored):
    out = tmp_path / "out"
    sweep = ("--budgets", 32, 0.5, "--budget-floor", 32, "--windows", 1)
    values = run(json_command, ids_file, out, *sweep)
    assert len(scored) == 3
    pooled = {row["run"]: row for row in values["pooled"]}
    assert list(pooled) == ["full", "quest-b32-p8", "quest-b0.5-p8"]
    assert len({row["nll"]["mean"] for row in pooled.values()}) == 3
    rows = [line.split("|") for line in (out / "table.md").read_text().splitlines() if "| Quest" in line]
    assert [row[3].strip() for row in rows[:2]] == ["32", "0.5"]
    assert (out / "excess-budget.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "excess-window.png").exists() and not (out / "excess-page-size.png").exists()


def test_the_ladder_with_all_budgets_as_one_batch(json_command, ids_file, tmp_path, scored, monkeypatch):
    # Its ends, and all that lies between them as one step: fewer programs to compile.
    between = {name: value for _, part in LADDER[2:-1] for name, value in part.items()}
    short = (*LADDER[:2], ("all that is between", between), LADDER[-1])
    for module in (ladder, tables, compare_plots):
        monkeypatch.setattr(module, "LADDER", short)
    out = tmp_path / "out"
    sweep = ("--budgets", 32, 48, "--page-sizes", 16, "--windows", 1, "--sink-pages", 0)
    alone = run(json_command, ids_file, out, *sweep)
    assert len(scored) == 3
    (out / "runs" / "quest-b32-sinks0.npz").unlink()
    (out / "runs" / "quest-b48-sinks0.npz").unlink()
    scored.clear()
    values = run(
        json_command, ids_file, out, *sweep, "--ladder", "--presets", "mean-key", "--budgets-together"
    )
    assert len(scored) == len(short)  # each serves both budgets, and the last step is the preset
    pooled, before = ({row["run"]: row for row in rows["pooled"]} for rows in (values, alone))
    for name in ("quest-b32-sinks0", "quest-b48-sinks0"):
        assert pooled[name]["nll"]["mean"] == pytest.approx(before[name]["nll"]["mean"], abs=1e-5)
    top = preset("mean-key", budget_tokens=48)
    assert run_name(top) in pooled and len(pooled) == 1 + 2 * len(short)
    assert (out / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    table = (out / "table.md").read_text()
    for budget in (32, 48):
        section = table.split(f"## From Quest to preset mean-key, budget {budget}\n")[1].split("##")[0]
        words = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]
        assert words == ["Quest, no sink page", *(f"+ {step}" for step, _ in short[1:])]
