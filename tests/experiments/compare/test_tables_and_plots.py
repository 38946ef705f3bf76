from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from retro_jax import DecodeConfig
from retro_jax.experiments.compare.comparison import rows, summary
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.html_page import comparison_page
from retro_jax.experiments.compare.pictures import sweep_pictures
from retro_jax.experiments.compare.sweep import Sweep, quest_of
from retro_jax.experiments.compare.tables import comparison_report, comparison_table
from retro_jax.experiments.io.estimates import Estimate
from retro_jax.experiments.io.settings import label, order, run_name

IDENTITY = {
    "model": "m",
    "dtype": "float32",
    "texts": ["a", "b"],
    "tokens": 640,
    "prompt_tokens": 128,
    "config": {"budget_floor": 256, "cache_tokens": None},
}


@pytest.fixture
def runs():
    """Full attention is noise; Quest is 0.2 above it, windows 2 and 4 are 0.15 and 0.1."""
    rng = np.random.default_rng(0)
    full = rng.normal(3.0, 1.0, size=(2, 512))
    excess = {"full": 0.0, "quest": 0.2, 2: 0.15, 4: 0.1}
    found = []
    for config in Sweep((2, 4), (64,), sink_pages=(0, 1), no_overwrite=True).configurations(DecodeConfig()):
        added = excess[config.method] if config.method != "retro" else excess[config.window]
        exposure = np.array([np.nan]) if config.method == "full" else 1.0 + 0.1 * np.arange(config.slots)
        nll = full + (added if config.overwrite else 0.2)
        found.append(Run(run_name(config), config, nll, exposure, 4.0, 2.5e6, 1.0, {}))
    return found


def names(common=None, **values):
    return [run_name(config) for config in Sweep(**values).configurations(common or DecodeConfig())]


def test_configurations():
    assert names(windows=(1, 8, 2, 2)) == ["full", "quest", "retro-w2", "retro-w8"]
    with pytest.raises(ValueError, match="window 0 is below 1"):
        names(windows=(0,))
    with pytest.raises(ValueError, match="--page-sizes needs at least one value"):
        names(page_sizes=())


def test_configurations_of_other_methods_scores_and_evictions():
    common = DecodeConfig(cache_tokens=512)
    more = {"methods": ("tova", "snapkv"), "scores": ("bounds", "mean_key"), "evict": ("h2o",)}
    assert names(common, **more) == [
        "full",
        "quest",
        "retro-w4",
        "quest-mean_key",
        "retro-w4-mean_key",
        "quest-evict_h2o",
        "retro-w4-evict_h2o",
        "quest-evict_h2o-mean_key",
        "retro-w4-evict_h2o-mean_key",
        "tova",
        "snapkv",
    ]
    configs = Sweep(**more).configurations(common)
    assert {config.kept_statistics for config in configs if config.score == "mean_key"} == {"mean_key"}
    with pytest.raises(ValueError, match=r"--methods has 'quest'; use streaming, tova, h2o, snapkv"):
        names(methods=("quest",))


def test_a_sweep_runs_every_combination_and_full_attention_once():
    swept = {"budgets": (256, 0.25), "page_sizes": (16, 32), "group_reduces": ("mean", "max")}
    configs = Sweep(**swept, methods=("streaming",)).configurations(DecodeConfig(page_size=64))
    assert len(configs) == 1 + 8 * 3 and len({run_name(config) for config in configs}) == len(configs)
    assert {run_name(c) for c in configs} >= {"quest-b256", "retro-w4-b0.25-p32-max", "streaming-b0.25-max"}
    last = next(config for config in configs if run_name(config) == "retro-w4-b256-p32-max")
    assert (last.budget_tokens, last.page_size, last.group_reduce) == (256, 32, "max")
    assert quest_of(last) in configs and quest_of(last).page_size == 32
    in_order = sorted(configs, key=order)
    assert in_order[0].method == "full"
    assert [config.budget_tokens for config in in_order[1:]] == [256] * 12 + [None] * 12


def test_partly_revised_layers_come_after_quest_and_whole_windows():
    configs = Sweep(windows=(2,), budgets=(96,), revised_layers=(0.25, 0.5)).configurations(DecodeConfig())
    in_order = [(config.method, config.revised_layers) for config in sorted(configs, key=order)]
    assert in_order == [("full", 1.0), ("quest", 1.0), ("retro", 1.0), ("retro", 0.25), ("retro", 0.5)]


def test_runs_with_and_without_rectification_have_an_order():
    configs = Sweep(rectify=(8, 1), evict=("h2o",)).configurations(DecodeConfig(cache_tokens=512))
    in_order = sorted(reversed(configs), key=order)
    assert in_order[0].method == "full"
    assert [(c.evict, c.rectify_every) for c in in_order[1::2]] == [
        (None, None),
        (None, 1),
        (None, 8),
        ("h2o", None),
    ]


def test_other_ways_to_load_join_quest_retro_attention_and_presets():
    joined = {"top_p": (0.9,), "anchor_every": (4,), "select_every": (16,)}
    for flag, (value,) in joined.items():
        sweep = Sweep(**{flag: (value,)}, evict=("h2o",), presets=("mean-key",))
        configs = sweep.configurations(DecodeConfig(cache_tokens=512))
        assert len({run_name(config) for config in configs}) == len(configs) == 1 + 2 * (1 + 2) + 2
        field = "budget_top_p" if flag == "top_p" else flag
        joins = [config for config in configs if getattr(config, field) == value]
        assert [(c.method, c.score) for c in joins] == [
            ("quest", "bounds"), ("retro", "bounds"), ("quest", "mean_key")
        ]  # fmt: skip
        assert all(quest_of(config) in configs for config in joins[:2])
        assert all(getattr(config, field) != value for config in map(quest_of, joins))
    both = names(**joined)
    assert {"quest-top_p0.9", "retro-w4-anchors4-reuse16", "quest-top_p0.9-anchors4-reuse16"} <= set(both)
    assert len(both) == 1 + 2 * 2**3


def test_windows_run_in_the_lower_layers_only_too():
    sweep = Sweep(revised_layers=(0.5,), evict=("h2o",), presets=("paper", "mean-key"), no_overwrite=True)
    configs = sweep.configurations(DecodeConfig(cache_tokens=512))
    lower = [config for config in configs if config.revised_layers == 0.5]
    assert [run_name(config) for config in lower] == [
        "retro-w4-revised0.5", "retro-w4-evict_h2o-revised0.5", "retro-w4-sinks0-revised0.5"
    ]  # fmt: skip
    assert all(quest_of(config) in configs for config in lower[:2])


def test_full_attention_quest_evictions_and_presets_also_run_with_a_cache_of_8_bits():
    sweep = Sweep(
        cache_dtype=("int8",), evict=("h2o",), rectify=(1,), methods=("tova",), presets=("mean-key",)
    )
    configs = sweep.configurations(DecodeConfig(cache_tokens=512))
    found = {run_name(config): config for config in configs}
    assert len(found) == len(configs) == 2 * (1 + 2 * 3 + 1 + 2)
    assert [name for name, config in found.items() if config.cache_dtype == "int8"] == [
        "full-cache_int8",
        "quest-cache_int8", "retro-w4-cache_int8", "quest-cache_int8-f1", "retro-w4-cache_int8-f1",
        "quest-cache_int8-evict_h2o", "retro-w4-cache_int8-evict_h2o", "tova-cache_int8",
        *(name for name in found if "mean_key" in name and "cache_int8" in name),
    ]  # fmt: skip
    assert label(found["full-cache_int8"]) == "full (int8 cache)"
    assert sorted(reversed(configs), key=order)[0] == found["full"]  # what excess is over
    assert quest_of(found["retro-w4-cache_int8"]) == found["quest"]


def test_full_attention_with_another_cache_has_an_excess():
    rng = np.random.default_rng(0)
    exact = rng.normal(3.0, 1.0, size=(2, 512))
    runs = []
    for config in Sweep((4,), (64,), cache_dtype=("int8",)).configurations(DecodeConfig()):
        added = 0.01 * (config.cache_dtype is not None) + 0.2 * (config.method != "full")
        runs.append(Run(run_name(config), config, exact + added, np.ones(config.slots), 4.0, 2.5e6, 1.0, {}))
    lines = comparison_table(rows(runs, [(128, 640)], 128), [(128, 640)]).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[4:6] for line in lines[2:]}
    assert cells["full"][0].strip() == "" and cells["full (int8 cache)"][0].strip().startswith("0.0100")
    assert cells["Quest (int8 cache)"][0].strip().startswith("0.2100")
    assert {line.split("|")[2].strip() for line in lines[2:4]} == {""}  # no window


def test_rows_compare_with_the_quest_of_their_sink_pages(runs):
    found = {row.run.name: row for row in rows(runs, [(128, 384), (384, 640)], 128)}
    assert found["full"].excess == Estimate(0.0, 0.0)
    assert found["full"].ratio is None
    row = found["retro-w4-b64"]
    assert row.excess.mean == pytest.approx(0.1)
    assert [part.mean for part in row.by_position] == pytest.approx([0.1, 0.1])
    assert row.ratio.mean == pytest.approx(0.5)
    assert row.quest_difference == pytest.approx(0.1)
    assert found["retro-w4-b64-sinks0-no_overwrite"].quest_difference == pytest.approx(0.0, abs=1e-12)


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


def test_of_quests_is_a_dash_where_quest_loses_nothing_that_can_be_told(runs):
    noise = np.random.default_rng(1).normal(size=(2, 512))
    noise -= noise.mean()
    sinks = [run.config.sink_pages == 1 and run.config.method == "quest" for run in runs]
    (place,) = np.flatnonzero(sinks)
    runs[place] = replace(runs[place], nll=runs[0].nll + noise)  # the other Quest has its excess of 0.2
    report, shown = comparison_report(IDENTITY, runs, 512), summary(IDENTITY, runs, 512)
    assert "A dash: what is divided by is within 2 standard errors of 0, or 0." in report
    table = comparison_table(rows(runs, [(128, 640)], 128), [(128, 640)]).splitlines()
    of_quest = [cells[6].strip() for line in table[2:] if (cells := line.split("|")[1:-1])]
    dashes = [run.config.sink_pages == 1 and run.config.method != "full" for run in runs]
    assert [cell == "-" for cell in of_quest] == dashes and sum(dashes) == 4
    page = comparison_page(shown, runs).decode()
    assert page.count('[null,"-"]') == 4 * 3  # all texts together, and each
    assert "A dash: what is divided by is within 2 standard errors" in page


def test_report_has_every_text(runs):
    report = comparison_report(IDENTITY, runs, 256)
    assert "## a\n" in report
    assert "## b\n" in report
    assert "128-383" in report
    assert "Settings: budget 64, page size 16, group reduce mean, budget_floor 256." in report
    assert "In retro-w4-b64-no_overwrite no token's value differs from Quest's by more than" in report


def curves(runs, setting, monkeypatch):
    """What is drawn against a setting: panel titles, and each line's points by panel and name."""
    titles, drawn = [], {}

    def savefig(figure, *_, **__):
        for panel in figure.axes:
            titles.append(panel.get_title("left"))
            for line in panel.get_lines():
                if not line.get_label().startswith("_"):
                    drawn[titles[-1], line.get_label()] = line.get_xydata().tolist()

    monkeypatch.setattr(Figure, "savefig", savefig)
    assert sweep_pictures(IDENTITY, runs, setting)
    return titles, drawn


def test_excess_against_budget(monkeypatch):
    found = []
    for config in Sweep((1, 4), (64, 128), sink_pages=(0, 1)).configurations(DecodeConfig()):
        pages = 4.0 if config.budget_tokens == 64 else 8.0
        nll = np.full((1, 256), 3.0 if config.method == "full" else 3.0 + 1 / pages / config.slots)
        found.append(Run(run_name(config), config, nll, np.ones(1), pages, 1e6, 1.0, {}))
    titles, drawn = curves(found[::-1], "budget", monkeypatch)
    assert titles == ["sink pages 0", "sink pages 1"]
    assert list(drawn) == [(title, name) for title in titles for name in ("Quest", "Retro, w = 4")]
    assert drawn["sink pages 1", "Quest"] == [[64, 0.25], [128, 0.125]]
    assert drawn["sink pages 0", "Retro, w = 4"] == [[64, 0.0625], [128, 0.03125]]
    assert sweep_pictures(IDENTITY, found, "page size") == {}
    assert sweep_pictures(IDENTITY, found, "window") == {}


def test_excess_against_window(runs, monkeypatch):
    _, drawn = curves(runs, "window", monkeypatch)
    assert [x for x, _ in drawn["sink pages 0", "Retro"]] == [1, 2, 4]
    assert [y for _, y in drawn["sink pages 0", "Retro"]] == pytest.approx([0.2, 0.15, 0.1])
