"""Differences from a base: what tables say, and that the committed ones are those of the committed data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_jax.experiments.analyses.distances_shown import distances_report
from retro_jax.experiments.io.estimates import Estimate, estimate, ratio
from retro_jax.experiments.io.tables import markdown, number
from retro_jax.experiments.study import data, differences
from retro_jax.experiments.study.variants import (
    LOADED_OTHERWISE,
    PRESET,
    SINK,
    partly_revised,
    revised,
    variants,
)

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"
REVISION = RESULTS / "revision"
FOLDERS = (REVISION, REVISION / "held-out", REVISION / "library")
LEARNED = RESULTS / "learned"
FORM = revised(4, sink=True)
LOWER_HALF = partly_revised(FORM)


def a_cell(**excess):
    """Two texts; each variant has a share of 0.4 nats at two budgets, and noise of its own."""
    rng = np.random.default_rng(0)
    results = [
        data.Result(name, budget, 1e6 * budget, 0.4 * share + rng.normal(size=(2, 8)) / 1000)
        for name, share in excess.items()
        for budget in (1.0, 2.0)
    ]
    return data.Cell("M", "prose", ("a", "b"), 612, 100, "float32", 9e6, {}, np.full((2, 8), 3.0), results)


def cells_of(row):
    return [cell.strip() for cell in row.split("|")[1:-1]]


def rows_of(page):
    """Lines of tables, without what aligns them."""
    return {" ".join(line.split()) for line in page.splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("folder", (*FOLDERS, LEARNED), ids=lambda folder: folder.name)
def test_the_committed_tables_are_those_of_the_committed_data(folder):
    assert differences.page(data.load(folder)) == (folder / "tables.md").read_text()


def test_the_rows_shown_are_those_of_the_tables():
    pages = [(folder / "tables.md").read_text() for folder in FOLDERS]
    known, shown = set().union(*map(rows_of, pages)), rows_of((REVISION / "README.md").read_text())
    first = {cells_of(row)[0] for row in known} - {""}
    body = [row for row in shown if cells_of(row)[0] in first]
    assert len(body) > 20
    assert not [row for row in body if row not in known]


def test_the_distances_shown_are_those_of_the_committed_data():
    rows, closest = [], []
    for name in ("smollm2-prose", "smollm2-code", "qwen-prose", "qwen-code"):
        values = json.loads((REVISION / "distances" / f"{name}.json").read_text())
        assert values["model"] in distances_report(values)
        for case, words in (("quest", "Quest, a sink page"), ("mean-key", PRESET)):
            found = values["cases"][f"{case}-w4-s1-b256"]
            parts = (found["of_no_window"][part] for part in ("keys", "values", "outputs"))
            left = (number(Estimate(**part), 3) for part in parts)
            rows.append([f"{values['model']}: {words}", *left])
            closest += [layer["mean"] for layer in found["cosine"][-1]["layers"]]
    table = markdown(["", "keys", "values", "outputs"], rows)
    shown = rows_of((REVISION / "README.md").read_text())
    assert {row for row in rows_of(table) if not row.startswith("| -")} <= shown
    assert min(closest) > 0.9977


def test_half_a_window_is_better_than_quest_everywhere_that_was_measured():
    found = {}
    for folder in FOLDERS:
        for one in data.load(folder):
            for own, base in differences.pairs(one, LOWER_HALF, SINK):
                difference = own.excess - base.excess
                found[folder.name, one.name, own.budget] = (
                    difference.mean() / estimate(difference, block=1).error,
                    difference.mean() / base.excess.mean(),
                )
    assert len(found) == 48  # on two sets of texts, on one of them by a probe and by the library
    shares = [share for _, share in found.values()]
    assert (min(shares), max(shares)) == pytest.approx((-0.142, -0.0126), abs=0.001)
    assert sum(z < -2 for z, _ in found.values()) == 47


def test_full_attention_and_quest_are_those_of_the_first_study():
    first = {one.name: one for one in data.load(RESULTS / "two-models")}
    for one in data.load(REVISION):
        np.testing.assert_allclose(one.full, first[one.name].full, atol=1e-6)
        for budget in (128.0, 256.0, 512.0, 0.15):
            own, other = (cell.result(SINK, budget) for cell in (one, first[one.name]))
            assert own.kv_bytes == pytest.approx(other.kv_bytes, abs=1)
            assert own.excess.mean() == pytest.approx(other.excess.mean(), rel=0.012)


def test_rows_begin_with_the_base_and_say_what_they_add():
    names = (SINK, FORM, LOWER_HALF, f"{SINK}, top-p 0.9", f"{SINK}s", PRESET)
    cell = a_cell(**dict.fromkeys(names, 1))
    assert differences.rows([cell], SINK, FORM) == [FORM, LOWER_HALF]
    assert differences.rows([cell], SINK, SINK) == [f"{SINK}, top-p 0.9"]
    page = differences.page([cell])
    forms, loaded = page.split("## Pages chosen or loaded otherwise")
    assert "| lower half " in forms and "top-p" not in forms
    assert "| top-p 0.9 " in loaded and f"## Beside {PRESET}" not in page


def test_differences_are_in_percent_of_the_base():
    cells = [a_cell(**{SINK: 1, FORM: 0.5, LOWER_HALF: 1.25}), a_cell(**{SINK: 1, FORM: 1.5})]
    header, _, nats, form, half = differences.differences(cells, SINK, FORM, 2.0).splitlines()
    assert cells_of(header) == ["", "M, prose", "M, prose"] and cells_of(nats)[1].startswith("0.4")
    values = [float(cell.split(" ± ")[0]) for cell in (*cells_of(form)[1:], cells_of(half)[1])]
    assert values == pytest.approx([-50, 50, 25], abs=0.3)
    assert cells_of(half)[2] == ""  # did not run
    with_bytes = differences.differences([a_cell(**{SINK: 1, f"{SINK}, x": 1})], SINK, SINK, 2.0).splitlines()
    assert cells_of(with_bytes[0])[2] == "MB" and cells_of(with_bytes[3])[2] == "2.0"


def test_there_is_no_percentage_of_nothing():
    cells = [a_cell(**{SINK: 0, FORM: 0.5}), a_cell(**{SINK: 1, FORM: 0.5})]
    form = differences.differences(cells, SINK, FORM, 2.0).splitlines()[3]
    assert cells_of(form)[1] == "-" and cells_of(form)[2].startswith("-50.")
    (verdict,) = differences.verdicts(cells, SINK, FORM).splitlines()[2:]
    worst, best = map(float, cells_of(verdict)[-2:])
    assert -51 < worst <= best < -49
    (verdict,) = differences.verdicts(cells[:1], SINK, FORM).splitlines()[2:]
    assert cells_of(verdict)[-2:] == ["-", "-"]


def test_verdicts_count_by_blocks_and_by_texts():
    cell = a_cell(**{SINK: 1, FORM: 0.5, LOWER_HALF: 1.25})
    excess = cell.result(SINK, 1.0).excess + np.array([[0.3], [-0.1]])
    parted = replace(cell.result(LOWER_HALF, 1.0), excess=excess)
    cell = replace(cell, results=[*(run for run in cell.results if run.variant != LOWER_HALF), parted])
    form, half = differences.verdicts([cell], SINK, FORM).splitlines()[2:]
    assert cells_of(form)[1:6] == ["0", "2", "0", "2", "2"]
    # Within the texts it is sure; the two texts part.
    assert cells_of(half)[1:] == ["1", "0", "0", "0", "1", "+25.0", "+25.0"]


def test_the_names_of_rows_that_the_study_has_too_are_its_names():
    names = {run.variant for folder in FOLDERS for one in data.load(folder) for run in one.results}
    assert {SINK, FORM, LOWER_HALF, partly_revised(f"{PRESET}, w = 4")} <= names & variants().keys()
    assert {base + words for base in (SINK, PRESET) for words in LOADED_OTHERWISE} <= names


def test_tables_are_written_where_the_data_is(tmp_path):
    data.save(tmp_path, [a_cell(**{SINK: 1, FORM: 0.5})])
    differences.Differences(folders=(tmp_path,)).run()
    assert (tmp_path / "tables.md").read_text() == differences.page(data.load(tmp_path))


SCORES = ("preset mean-key", "preset mean-key, pages of 8")
LEAST = "learned score, 32 channels, pages of 8"


def test_excess_shown_of_learned_scores_is_that_of_the_data():
    cells, shown = data.load(LEARNED), (LEARNED / "README.md").read_text()
    for one in cells:
        for name in dict.fromkeys(run.variant for run in one.results):
            found = [estimate(one.result(name, budget).excess, block=1) for budget in (128, 256, 512, 0.15)]
            values = " | ".join(f"{1e3 * at.mean:.1f} ± {1e3 * at.error:.1f}" for at in found)
            label = name.replace(f"{LEAST}, ", "")
            assert f"| {one.name}: {label} | {values} |" in shown
        for run in (run for run in one.results if run.variant == LEAST):
            best = min((one.result(name, run.budget).excess for name in SCORES), key=np.mean)
            assert (run.excess - best).mean(axis=1).max() < 0
            left = ratio(run.excess, best, block=1)
            assert f"{left.mean:.2f} ± {left.error:.2f}" in shown


def test_recall_shown_of_learned_scores_is_that_of_the_lists():
    found = json.loads((LEARNED / "recall.json").read_text())
    shown = (LEARNED / "README.md").read_text()
    for name in SCORES + tuple(key for key in found if key.startswith("learned")):
        values = " | ".join(f"{sum(hits) / 30 / len(hits):.3f}" for hits in found[name].values())
        assert f"| {name} | {values} |" in shown
