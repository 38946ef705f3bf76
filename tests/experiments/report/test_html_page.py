"""The report for a browser: the same numbers as the Markdown page, for all runs."""

import json

import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.io.files import finite
from retro_jax.experiments.report.data import read_run, run_values
from retro_jax.experiments.report.html_page import report_page
from retro_jax.experiments.tasks.longgenbench import LongGenBench
from retro_jax.experiments.tasks.pg19 import PG19
from tests.experiments.report.test_report import METHODS, a_run, result, scored
from tests.experiments.test_pages import Parsed, chart_of


def test_scores_of_several_runs(tmp_path):
    runs = [read_run(a_run(tmp_path / f"n{n}", LongGenBench(n=n), scored(n), replies=99)) for n in (3, 6)]
    page = Parsed(report_page(runs))
    values = [run_values(run) for run in runs]
    results = page.json("results")
    assert results["runs"] == json.loads(json.dumps(finite(values)))
    assert [row["method"] for row in results["paper"]] == ["retro-w4-b128", "retro-w4-b256"] * 2
    shown = page.json("shown")
    table = shown["tables"][0]
    assert [row[:2] for row in table["rows"]] == [[method, run.title] for run in runs for method in METHODS]
    column = [column["name"] for column in table["columns"]].index("value")
    found = values[1]["methods"]["quest-b256"]["value"]
    assert table["rows"][7][column] == [
        found["mean"],
        f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
    ]
    titles = ["by position", "by bytes read", "by questions"]
    assert [chart["title"] for chart in shown["charts"]] == [
        *(f"Score {title}" for title in titles), "Exposure", "Time of a step"
    ]  # fmt: skip
    _, lines = chart_of(shown, "Score by questions")
    assert page.text("h1").strip() == "named (n3), named (n6)"
    full = next(line for told, line in lines.items() if ("method", "full") in told)
    means = [of_run["methods"]["full"]["value"]["mean"] for of_run in values]
    assert full["x"] == [3, 6] and full["y"] == pytest.approx(means, rel=1e-5)
    _, lines = chart_of(shown, "Time of a step")
    assert [line["y"] for line in lines.values()] == [
        [50.0],
        [50.0],
    ]  # the method that has no time has no line
    told = {
        table["title"]: dict(map(tuple, table["rows"]))
        for table in shown["tables"]
        if len(table["columns"]) == 2
    }
    assert told["Configuration of runs: the same in all"]["task.source"] == "gsm8k"
    assert told["Where it was computed"]["commit"] == "abc"
    configured = [table for table in shown["tables"] if table["title"].startswith("Configuration of methods")]
    names = {column["name"] for column in configured[0]["columns"][1:]} | {
        row[0] for row in configured[1]["rows"]
    }
    assert names == set(DecodeConfig.__dataclass_fields__)
    unfinished = [text for name, text in page.texts if "is unfinished" in text and name == "p"]
    assert len(unfinished) == 2 * len(METHODS) and "12 of 99 replies" in unfinished[0]


def test_likelihoods(tmp_path):
    lines = [
        result(f"b{index}", method, nll=[3.0 + 0.1 * place + 0.001 * position for position in range(40)])
        for index in range(6)
        for place, method in enumerate(METHODS)
    ]
    run = read_run(a_run(tmp_path / "a", PG19(prompt_tokens=100, tokens=140), lines, note=False))
    shown = Parsed(report_page([run])).json("shown")
    assert [chart["title"] for chart in shown["charts"]] == [
        "Excess by position",
        "NLL by bytes read",
        "Exposure",
    ]
    chart, lines = chart_of(shown, "Excess by position")
    assert "full" not in chart["values"][chart["settings"].index("method")]
    assert all(len(line["y"]) == 10 for line in lines.values())
    assert sorted(line["y"][0] for line in lines.values()) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_page_that_is_there_is_not_replaced(failure, tmp_path):
    (tmp_path / "page.html").touch()
    line = failure("report", tmp_path, "--out", tmp_path / "page.md")
    assert "page.html exists; choose another --out, or pass --overwrite" in line
