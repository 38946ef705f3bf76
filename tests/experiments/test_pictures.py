"""Pictures of comparisons and runs; what all of them must hold: `drawn.py`."""

import itertools

import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.pictures import comparison_pictures, ladder_pictures, position_pictures
from retro_jax.experiments.compare.sweep import Sweep
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.report.data import Measured
from retro_jax.experiments.report.pictures import (
    budget_plot,
    excess_plot,
    exposure_plot,
    latency_plot,
    position_plot,
    questions_plot,
)
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.pg19 import PG19
from tests.experiments.drawn import PATH

# Comparisons


def a_comparison(sweep, texts=1, scored=64, excess=None, model="random:tiny", draw=comparison_pictures):
    """Pictures of a comparison whose excess is a function of its number and configuration."""
    excess = excess or (lambda _, config: 20 / (config.budget_tokens or 256) / config.slots)
    rng = np.random.default_rng(0)
    full, runs = rng.normal(3.0, 1.0, size=(texts, scored)), []
    for number, config in enumerate(sweep.configurations(DecodeConfig())):
        dense, loaded = config.method == "full", config.budget_tokens or 256
        added = 0.0 if dense else excess(number, config) * np.linspace(0.9, 1.1, scored)
        exposure = [np.nan] if dense else 1 + 0.1 * np.arange(config.slots)
        kv_bytes = 1e9 if dense else 1e4 * loaded
        values = np.array(exposure), loaded / config.page_size, kv_bytes, 1.0, {}
        runs.append(Run(run_name(config), config, full + added, *values))
    names = [f"a_novel_with_a_long_name_{text}" for text in range(texts)]
    identity = {
        "model": model,
        "dtype": "float32",
        "texts": names,
        "tokens": 32 + scored,
        "prompt_tokens": 32,
    }
    return draw(identity, runs)


def test_a_short_comparison_has_points_in_every_panel(drawn):
    found = a_comparison(Sweep((4,), (32, 48), sink_pages=(0, 1)))
    assert list(found) == ["comparison.png", "exposure.png", "excess-budget.png"]
    (first, *_) = drawn
    assert [axes.get_title("left") for axes in first.axes] == [
        f"budget {budget}, sink pages {sinks}" for budget in (32, 48) for sinks in (0, 1)
    ]
    points = first.axes[0].get_lines()[0].get_xydata()
    np.testing.assert_allclose(points[:, 0], 32 + 8 * (np.arange(8) + 0.5))
    assert "n = 1 text (a_novel_with_a_long_name_0), 64 scored tokens after a prompt of 32" in " ".join(
        first.get_supxlabel().split()
    )


@pytest.mark.parametrize(
    ("sweep", "panels"),
    [
        (
            Sweep((4,), (32, 48), presets=("paper", "mean-key")),
            {
                f"budget {budget}": ["Quest", "Retro, w = 4", "preset paper, w = 4", "preset mean-key"]
                for budget in (32, 48)
            },
        ),
        (  # a panel has the preset whose settings it shares, and all have one that shares none
            Sweep((1,), (128,), sink_pages=(1, 2), page_sizes=(8, 32), presets=("mean-key",)),
            {
                f"page size {size}, sink pages {sinks}": ["Quest", *["preset mean-key"] * (sinks == 1)]
                for size in (8, 32)
                for sinks in (1, 2)
            },
        ),
        (  # two presets that share their settings are a panel, as two values of the setting are
            Sweep((4,), (64,), presets=("quest", "paper")),
            {f"sink pages {sinks}": ["Quest", "Retro, w = 4"] for sinks in (0, 1)},
        ),
        (
            Sweep((4,), (64,), presets=("mean-key",), cache_dtype=("int8",)),
            {
                "": [
                    f"{method}{cache}{window}"
                    for method, window in (("Quest", ""), ("Retro", ", w = 4"), ("preset mean-key", ""))
                    for cache in ("", " (int8 cache)")
                ]
            },
        ),
    ],
)
def test_a_preset_is_a_line_beside_the_others(drawn, sweep, panels):
    a_comparison(sweep, draw=position_pictures)
    (figure,) = drawn
    (legend,) = figure.legends
    names = {
        (line.get_color(), line.get_marker(), line.get_linestyle()): text.get_text()
        for line, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
    }
    shown = {
        axes.get_title("left"): sorted(
            names[key]
            for line in axes.get_lines()
            if (key := (line.get_color(), line.get_marker(), line.get_linestyle())) in names
        )
        for axes in figure.axes
    }
    assert shown == {title: sorted(lines) for title, lines in panels.items()}
    assert "Shown are" not in figure.get_supxlabel()


@pytest.mark.parametrize("scored", [1, 3, 65, 513])
def test_comparisons_of_any_length(drawn, scored):
    assert "comparison.png" in a_comparison(Sweep((2,), (32,)), scored=scored)


def test_nothing_is_drawn_of_one_method_but_its_excess(drawn):
    assert list(a_comparison(Sweep((1,), (32,)))) == ["comparison.png"]


@pytest.mark.parametrize("excess", [0.0, -0.2, 1e-9, 1e6])
def test_excess_of_any_size(drawn, excess):
    found = a_comparison(Sweep((2, 4), (64,)), 2, 640, lambda *_: excess)
    assert list(found) == ["comparison.png", "exposure.png", "excess-window.png"]


def test_values_that_are_not_finite_are_told_and_panels_without_others_left_out(drawn):
    infinite = {2: np.nan, 5: np.nan, 6: np.inf}
    with np.errstate(invalid="ignore"):
        a_comparison(Sweep((4,), (32, 48, 64)), 1, 64, lambda number, _: infinite.get(number, 0.1))
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["budget 32", "budget 48"]
    assert "not finite and so not drawn: 24." in " ".join(drawn[0].get_supxlabel().split())
    drawn.clear()
    assert list(a_comparison(Sweep((4,), (32,)), 1, 64, lambda *_: np.nan)) == ["exposure.png"]


@pytest.mark.parametrize(
    ("budgets", "sinks", "methods", "titles", "told"),
    [
        (5, (0, 1), (), [f"budget {2**n}" for n in range(6, 11)], "Shown are 30 of 60 runs (sink pages 1);"),
        (
            5,
            (0, 2),
            ("streaming", "tova", "h2o"),
            [f"budget {2**n}" for n in range(6, 11)],
            "Shown are 45 of 90 runs (sink pages 0);",
        ),
        (
            9,
            (1,),
            (),
            [f"budget {2**n}" for n in (6, 8, 9, 11, 12, 14)],
            "Shown are 36 of 54 runs (budget 64, 256, 512, 2048, 4096, 16384);",
        ),
        (1, (0, 1), (), ["sink pages 0", "sink pages 1"], ""),
    ],
)
def test_a_large_comparison_draws_what_can_be_read_and_tells_the_rest(
    drawn, budgets, sinks, methods, titles, told
):
    given = tuple(2**n for n in range(6, 6 + budgets))
    sweep = Sweep((4,), given, sink_pages=sinks, scores=("bounds", "mean_key", "oracle"), methods=methods)
    found = a_comparison(sweep, 10, 128, model=PATH, draw=position_pictures)
    assert list(found) == ["comparison.png"]
    assert [axes.get_title("left") for axes in drawn[0].axes] == titles
    note = " ".join(drawn[0].get_supxlabel().split())
    assert told in note and ("comparison.html has all." in note) == bool(told)
    assert "and 6 more" in note and "…" in drawn[0].get_suptitle()


def test_a_comparison_of_many_methods_draws_a_dozen_lines(drawn):
    sweep = Sweep((2, 4, 8, 16), (64,), scores=("bounds", "mean_key", "oracle"))
    a_comparison(sweep, draw=position_pictures)
    assert len(drawn[0].axes[0].get_lines()) == len(drawn[0].legends[0].get_texts()) + 1 == 13
    told = "Shown are 12 of 15 runs (12 of 15 lines); comparison.html has all."
    assert told in " ".join(drawn[0].get_supxlabel().split())


@pytest.mark.parametrize(("excess", "scale"), [(0.1, "log"), (0.0, "linear"), (-0.1, "linear")])
def test_the_ladder(drawn, excess, scale):
    sweep = Sweep((2, 8), (128, 512), sink_pages=(0, 1), methods=("tova", "h2o", "streaming"), ladder=True)
    found = a_comparison(sweep, 2, 64, lambda number, _: excess * (1 + number), draw=ladder_pictures)
    assert list(found) == ["ladder.png"]
    (axes,) = drawn[-1].axes
    assert axes.get_yscale() == scale and axes.get_xscale() == "log"
    assert len(axes.get_lines()) == len(drawn[-1].legends[0].get_texts()) > 12


# Reports


def methods_of(**varied):
    return RunConfig(model=PATH, task=PG19(), **varied).configurations()


def a_run(methods, examples=2, n=4, likelihoods=False, timings=(), **task):
    rng = np.random.default_rng(0)
    lines = []
    for example, (method, config) in itertools.product(range(examples), methods.items()):
        exposure = [1.0 + 0.1 * step for step in range(config.slots)]
        line = {"example": f"e{example}", "method": method, "sample": 0, "exposure": exposure}
        line |= {"kv_bytes": 1e7 + 1e4 * (config.budget_tokens or 0)}
        values = rng.random(n).tolist()
        lines.append(line | ({"nll": values} if likelihoods else {"scores": values}))
    config = {"model": PATH, "task": {"name": "t", "source": "gsm8k", "n": n, "prompt_tokens": 9} | task}
    identity = {"name": "a run", "config": config | {"decode": {"sink_pages": 1, "score": "bounds"}}}
    return Measured([], identity, methods, lines, timings, [], {})


def every_plot(run):
    plots = (position_plot, excess_plot, budget_plot, exposure_plot, latency_plot)
    return [name for plot in plots for name in plot(run, plot.__name__)]


FEW = methods_of(budgets=(128,))
MANY = methods_of(
    methods=("full", "quest", "tova"),
    presets=("quest", "paper", "retro"),
    windows=(2, 4, 8),
    budgets=(128, 256, 512, 0.15),
)


@pytest.mark.parametrize("likelihoods", [False, True])
@pytest.mark.parametrize("methods", [FEW, MANY])
def test_reports(drawn, methods, likelihoods):
    names = every_plot(a_run(methods, n=40, likelihoods=likelihoods))
    assert names == [
        "excess_plot.png" if likelihoods else "position_plot.png",
        *(["budget_plot.png"] if methods is MANY else []),
        "exposure_plot.png",
    ]
    assert all("n = 2 examples" in figure.get_supxlabel() for figure in drawn)
    assert len(drawn[0].axes) == (4 if methods is MANY else 1)  # a panel for each budget
    told = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    presets = {"preset quest", "preset mean-key", *(f"preset paper-w{window}" for window in (2, 4, 8))}
    assert told & presets == (presets if methods is MANY else set())


@pytest.mark.parametrize(("examples", "intervals"), [(2, False), (6, True)])
def test_two_examples_have_no_intervals(drawn, examples, intervals):
    position_plot(a_run(FEW, examples), "p")
    assert bool(drawn[0].axes[0].containers) == intervals
    assert ("bootstrap intervals" in drawn[0].get_supxlabel()) == intervals


def test_a_method_without_scores_does_not_hide_the_others(drawn):
    run = a_run(FEW)
    lines = [line | {"scores": []} if line["method"] == "quest-b128" else line for line in run.lines]
    assert position_plot(Measured([], run.identity, FEW, lines, [], [], {}), "p")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["full", "retro-w4"]


def test_latencies_and_questions(drawn):
    timings = [
        {
            "method": method,
            "device": f"gpu {number}",
            "batch": 2,
            "context": 900,
            "steps_per_second": 20.0 + number,
        }
        for number in range(2)
        for method in FEW
    ]
    runs = [a_run(FEW, n=n, timings=timings) for n in (3, 6)]
    assert list(latency_plot(runs[0], "latency")) == ["latency.png"]
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["gpu 0, batch 2", "gpu 1, batch 2"]
    assert list(questions_plot(runs, "questions")) == ["questions.png"]
    assert not questions_plot(runs[:1], "questions")
