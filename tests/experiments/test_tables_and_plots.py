import struct

import numpy as np
import pytest

from experiments.compare import configurations, rows
from experiments.estimates import Estimate
from experiments.plots import comparison_figure
from experiments.results import Run, run_name
from experiments.tables import comparison_report, comparison_table, markdown, number, score_table
from retro_jax import DecodeConfig

IDENTITY = {
    "model": "m",
    "dtype": "float32",
    "texts": ["a", "b"],
    "tokens": 640,
    "prompt_tokens": 128,
    "config": {"budget": 0.15, "budget_floor": 256, "budget_tokens": 64, "page_size": 16},
}


@pytest.fixture
def runs():
    """Full attention is noise; Quest is 0.2 above it, windows 2 and 4 are 0.15 and 0.1."""
    rng = np.random.default_rng(0)
    full = rng.normal(3.0, 1.0, size=(2, 512))
    excess = {"full": 0.0, "quest": 0.2, 2: 0.15, 4: 0.1}
    found = []
    for config in configurations(DecodeConfig(budget_tokens=64), [2, 4], [0, 1], no_overwrite=True):
        added = excess[config.method] if config.method != "retro" else excess[config.window]
        exposure = np.array([np.nan]) if config.method == "full" else 1.0 + 0.1 * np.arange(config.slots)
        nll = full + (added if config.overwrite else 0.2)
        found.append(Run(run_name(config), config, nll, exposure, 2.5e6, 1.0, {}))
    return found


def test_markdown():
    assert markdown(["a", "number"], [["x", "1"], ["longer", "22"]]) == (
        "| a      | number |\n| ------ | -----: |\n| x      |      1 |\n| longer |     22 |"
    )


def test_number():
    assert number(Estimate(0.12345, 0.0012)) == "0.1235 ± 0.0012"
    assert number(Estimate(1.0, 0.0), 3) == "1.000"
    assert number(Estimate(1.0, float("nan")), 1) == "1.0"


def test_configurations():
    names = [run_name(config) for config in configurations(DecodeConfig(), [1, 8, 2, 2], [1], False)]
    assert names == ["full", "quest-sinks1", "retro-w2-sinks1", "retro-w8-sinks1"]
    with pytest.raises(ValueError, match="window 0 is below 1"):
        configurations(DecodeConfig(), [0], [1], False)
    with pytest.raises(ValueError, match="at least one value each"):
        configurations(DecodeConfig(), [], [1], False)


def test_configurations_of_other_methods_scores_and_evictions():
    common = DecodeConfig(cache_tokens=512)
    more = {"methods": ["tova", "snapkv"], "scores": ["bounds", "mean_key"], "evict": ["h2o"]}
    configs = configurations(common, [1, 4], [1], False, **more)
    assert [run_name(config) for config in configs] == [
        "full",
        "quest-sinks1",
        "retro-w4-sinks1",
        "quest-sinks1-mean_key",
        "retro-w4-sinks1-mean_key",
        "quest-sinks1-evict_h2o",
        "retro-w4-sinks1-evict_h2o",
        "quest-sinks1-mean_key-evict_h2o",
        "retro-w4-sinks1-mean_key-evict_h2o",
        "tova-sinks1",
        "snapkv-sinks1",
    ]
    assert {config.statistics for config in configs if config.score == "mean_key"} == {"mean_key"}
    with pytest.raises(ValueError, match=r"--methods has 'quest'; use streaming, tova, h2o, snapkv"):
        configurations(common, [1], [1], False, methods=["quest"])


def test_rows_compare_with_the_quest_of_their_sink_pages(runs):
    found = {row.run.name: row for row in rows(runs, [(128, 384), (384, 640)], 128)}
    assert found["full"].excess == Estimate(0.0, 0.0)
    assert found["full"].ratio is None
    row = found["retro-w4-sinks1"]
    assert row.excess.mean == pytest.approx(0.1)
    assert [part.mean for part in row.by_position] == pytest.approx([0.1, 0.1])
    assert row.ratio.mean == pytest.approx(0.5)
    assert row.quest_difference == pytest.approx(0.1)
    assert found["retro-w4-sinks0-no_overwrite"].quest_difference == pytest.approx(0.0, abs=1e-12)


def test_rows_of_one_text(runs):
    one, two = (rows(runs, [(128, 640)], 128, text)[0].nll.mean for text in (0, 1))
    assert one == pytest.approx(runs[0].nll[0].mean())
    assert two == pytest.approx(runs[0].nll[1].mean())
    assert one != two


def test_comparison_table(runs):
    lines = comparison_table(rows(runs, [(128, 640)], 128), [(128, 640)]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head = [
        "method",
        "w",
        "sink pages",
        "NLL",
        "excess NLL",
        "128-639",
        "of Quest's",
        "exposure",
        "KV MB/step",
    ]
    assert cells[0] == head
    assert cells[2][0:3] == ["full", "", ""]
    assert [line[0:3] for line in cells[4:7]] == [
        ["Retro", "2", "0"],
        ["Retro", "4", "0"],
        ["Retro (no overwriting)", "4", "0"],
    ]
    assert cells[5][4].startswith("0.1000")
    assert cells[5][6].startswith("0.500")
    assert cells[5][7:] == ["1.30", "2.50"]


def test_report_has_every_text(runs):
    report = comparison_report(IDENTITY, runs, 256)
    assert "## a\n" in report
    assert "## b\n" in report
    assert "128-383" in report
    assert "Settings: budget_tokens 64, page_size 16." in report
    assert "(w = 4, sink pages 1) no token's value differs from Quest's by more than" in report


def test_score_table():
    nll = np.array([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    lines = score_table(nll, 10, ["a", "b"], 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["text", "NLL", "perplexity", "10-11", "12-13"]
    assert cells[2] == ["a", "2.0000", "7.389", "1.0000", "3.0000"]
    assert cells[4] == ["all", "2.0000", "7.389", "1.5000", "2.5000"]


@pytest.mark.parametrize("tokens", [640, 200, 140])  # 8 blocks of text, one block, less than one
def test_figure_is_a_png(runs, tokens):
    short = [Run(r.name, r.config, r.nll[:, : tokens - 128], r.exposure, r.kv_bytes, 1.0, {}) for r in runs]
    png = comparison_figure(IDENTITY | {"tokens": tokens}, short)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 2 * height > 800
