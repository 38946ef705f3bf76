import json
from dataclasses import replace

import numpy as np
import pytest

from retro_jax.experiments.io.estimates import bootstrap
from retro_jax.experiments.report.data import read_runs
from retro_jax.experiments.report.leaderboard import leaderboards
from retro_jax.experiments.runs.config import CommonFlags
from retro_jax.experiments.tasks.longgenbench import LongGenBench
from retro_jax.experiments.tasks.pg19 import PG19
from retro_jax.experiments.tasks.ruler import RULER
from tests.experiments.report.test_report import METHODS, a_run, result, scored
from tests.experiments.test_pages import Parsed

MODEL = "smollm2-135m"
PRESET = "quest-b{}-mass-mean_key-mean_key_int8-traffic"
RULER_METHODS = ("full", "snapkv-b128", "snapkv-b256", "retro-w4-b128-sinks0", "retro-w4-b256-sinks0")
RULER_METHODS += (PRESET.format(128), PRESET.format(256))


def ruler(path, length, right, examples=6, **config):
    """A run of two sub-tasks, in the first of which so many examples as `right` says by method are right."""
    lines = []
    for method, count in right.items():
        for index in range(examples):
            for part, score in (("vt", 0.5), ("fwe", float(index < count))):
                example = f"{part}-{index:04}"
                lines.append(result(example, method, scores=[score], text="", part=part))
    config = {"model": MODEL, "methods": ("full", "snapkv"), "presets": ("paper", "mean-key")} | config
    return a_run(path, RULER(("fwe", "vt"), length=length, count=examples), lines, **config)


@pytest.fixture
def board(tmp_path):
    """Of two lengths of RULER and a task of another kind; the second length lacks the larger budget."""
    right = dict(zip(RULER_METHODS, (6, 2, 3, 4, 1, 4, 3), strict=True))
    short = ruler(tmp_path / "short", 1024, right)
    long = ruler(tmp_path / "long", 2048, {"full": 3, "snapkv-b128": 0, "retro-w4-b128-sinks0": 1})
    other = a_run(tmp_path / "other", LongGenBench(n=3), scored(3), model=MODEL)
    return leaderboards(read_runs([short, long, other]))


def test_methods_by_tasks_and_budgets(board):
    (found,) = board
    titles = ["fwe, 1024", "vt, 1024", "fwe, 2048", "vt, 2048", "longgenbench"]
    assert (found.model, [column.title for column in found.columns]) == (MODEL, titles)
    assert list(found.blocks) == [128, 256]
    rows = {budget: {row.method: row for row in rows} for budget, rows in found.blocks.items()}
    assert list(rows[128]) == [
        "full",
        "snapkv",
        "preset paper-w4",
        "preset mean-key",
        "quest",
        "retro-w4",
    ]
    assert list(rows[256]) == [
        "full",
        "snapkv",
        "preset paper-w4",
        "preset mean-key",
        "quest",
        "retro-w4",
    ]
    paper = rows[128]["preset paper-w4"]
    assert paper.values[0] == bootstrap([1.0] * 4 + [0.0] * 2) and paper.counts == [6, 6, 6, 6, 0]
    assert [value and value.mean for value in paper.values] == [4 / 6, 0.5, 1 / 6, 0.5, None]
    assert paper.mean is None and paper.kv_bytes is None  # longgenbench does not have it
    assert rows[128]["preset mean-key"].values[2:] == [None] * 3


def test_bytes_count_each_column_the_same(board):
    column, other = board[0].columns[:2]
    lines = [line | {"kv_bytes": float(line["example"].startswith("fwe"))} for line in column.run.lines]
    run = replace(column.run, lines=[*lines, *lines[:1]])
    label = next(iter(run.methods))
    assert [replace(each, run=run).kv_bytes(label) for each in (column, other)] == [1.0, 0.0]


def test_the_best_of_a_block_are_marked_beside_full_attention(board):
    (found,) = board
    best = {row.method: row.best for row in found.blocks[128]}
    assert not any(best["full"]) and not any(best["quest"])
    assert not any(row.best_mean for row in found.blocks[128])  # none has all the tasks
    assert best["preset paper-w4"] == [True, True, True, True, False]  # as good as another counts too
    assert best["snapkv"] == [False, True, False, True, False]
    assert best["retro-w4"] == [False] * 4 + [True]


def test_the_mean_counts_every_task_the_same(tmp_path):
    right = {"full": 6, "snapkv-b128": 3}
    folder = ruler(tmp_path / "a", 1024, right, methods=("full", "snapkv"), presets=(), budgets=(128,))
    (found,) = leaderboards(read_runs([folder]))
    full, snapkv = found.blocks[128]
    assert (full.mean.mean, snapkv.mean.mean) == (0.75, 0.5)
    assert (full.best_mean, snapkv.best_mean) == (False, True)
    assert snapkv.mean == bootstrap([1.0] * 3 + [0.0] * 3, [0.5] * 6) and snapkv.mean.low < 0.5


def test_methods_that_differ_in_any_setting_have_rows_of_their_own(tmp_path):
    right = {"full": 6, "snapkv-b128": 3}
    common = {"methods": ("full", "snapkv"), "presets": (), "budgets": (128,)}
    all_sparse = CommonFlags(dense_layers=0)
    folders = [
        ruler(tmp_path / "a", 1024, right, **common),
        ruler(tmp_path / "b", 2048, right, decode=all_sparse, **common),
    ]
    (found,) = leaderboards(read_runs(folders))
    told = {row.method: [value is not None for value in row.values] for row in found.blocks[128]}
    assert told == {
        "full": [True] * 4,  # which has no sparse layers
        "snapkv": [True, True, False, False],
        "snapkv-dense_layers=0": [False, False, True, True],
    }


def test_likelihoods_are_the_better_the_lower_and_have_no_part_in_the_mean(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        result(f"b{index}", method, nll=(rng.normal(3, 0.1, size=8) + number).tolist())
        for index in range(6)
        for number, method in enumerate(METHODS)
    ]
    runs = read_runs(
        [
            a_run(tmp_path / f"{tokens}", PG19(prompt_tokens=9, tokens=tokens), lines, model=MODEL)
            for tokens in (17, 18)
        ]
    )
    (found,) = leaderboards(runs)
    assert [column.title for column in found.columns] == ["pg19, tokens 17", "pg19, tokens 18"]
    quest, retro = found.blocks[128][1:]
    assert quest.best == [True, True] and retro.best == [False, False] and quest.mean is None


def test_on_the_page_and_as_values(json_command, tmp_path):
    folder = ruler(tmp_path / "a", 1024, dict.fromkeys(RULER_METHODS[:3], 3))
    lacking = folder / "results-0.jsonl"
    kept = [line for line in lacking.read_text().splitlines() if json.loads(line)["example"] != "fwe-0005"]
    lost = [line for line in lacking.read_text().splitlines() if json.loads(line)["method"] == "full"][-1:]
    lacking.write_text("\n".join(dict.fromkeys([*kept, *lost])) + "\n")
    values = json_command("report", folder, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.index("## Leaderboard") < page.index("Budget 128 tokens:") < page.index("Budget 256 tokens:")
    assert "| fwe, 1024 (n = 6) |" in page and "**0.60** (of 5)" in page and "**0.50 [0.50, 0.50]**" in page
    (board,) = values["leaderboards"]
    assert board["columns"][0] == {"title": "fwe, 1024", "metric": "share found", "examples": 6}
    rows = board["blocks"][0]["rows"]
    assert [row["method"] for row in rows] == ["full", "snapkv"] and rows[1]["values"][0]["mean"] == 0.6
    assert rows[1]["kv_bytes"] == 5e6
    html = Parsed((tmp_path / "page.html").read_bytes())
    assert html.json("results")["leaderboards"] == values["leaderboards"]
    tables = {table["title"]: table for table in html.json("shown")["tables"]}
    table = tables[f"Leaderboard of {MODEL}, budget 128 tokens"]
    assert [column["name"] for column in table["columns"]][:2] == ["method", "fwe, 1024 (n = 6)"]
    assert [row[:2] for row in table["rows"]][1] == ["snapkv", [0.6, "0.60 (of 5)"]]


def test_runs_in_folders_of_the_same_name_are_told_by_their_paths(tmp_path):
    right = dict.fromkeys(RULER_METHODS[:2], 3)
    folders = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    runs = read_runs([ruler(path, 1024, right, samples=n) for n, path in enumerate(folders, 1)])
    assert [run.title for run in runs] == [f"named ({path})" for path in folders]
    (board,) = leaderboards(runs)
    titles = [f"{part}, 1024, {path}" for path in folders for part in ("fwe", "vt")]
    assert [column.title for column in board.columns] == titles


def test_one_task_needs_no_leaderboard(tmp_path):
    run = a_run(tmp_path / "a", LongGenBench(n=3), scored(3))
    other = a_run(tmp_path / "b", LongGenBench(n=3), scored(3), model="another")
    assert leaderboards(read_runs([run])) == leaderboards(read_runs([run, other])) == []
