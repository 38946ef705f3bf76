"""What every picture must hold, small or large: points, words inside the canvas, lines told apart, and n."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retro_jax import DecodeConfig
from retro_jax.experiments.analyses.distances_shown import IN_CACHE, QUANTITIES, distances_pictures
from retro_jax.experiments.analyses.overlap import overlap_pictures
from retro_jax.experiments.bench.decode import latency_pictures
from retro_jax.experiments.bench.roofline import roofline_pictures
from retro_jax.experiments.bench.throughput_report import throughput_pictures
from retro_jax.experiments.compare.folder import Run
from retro_jax.experiments.compare.pictures import comparison_pictures, ladder_pictures, position_pictures
from retro_jax.experiments.compare.sweep import Sweep, run_name
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
from retro_jax.experiments.tpu.command import PARTS, static_pictures

PATH = (
    "/home/someone/.cache/huggingface/hub/models--org--Model_$with$_signs/snapshots/0e9e39f249a16976918f6564"
)


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, each checked."""
    found = []

    def savefig(figure, *_, **__):
        figure.draw_without_rendering()
        check(figure)
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def check(figure):
    renderer = figure.canvas.get_renderer()
    (legend,) = figure.legends
    words = [figure.get_suptitle(), figure.get_supxlabel(), *(text.get_text() for text in legend.get_texts())]
    assert re.search(r"\bn = \d", figure.get_supxlabel()), "n is not told"
    assert all(words) and not any(". ." in text for text in words)
    boxes = {f"axes {number}": axes.get_tightbbox(renderer) for number, axes in enumerate(figure.axes)}
    boxes["legend"] = legend.get_window_extent(renderer)
    boxes["title"] = figure._suptitle.get_window_extent(renderer)
    boxes["note"] = figure._supxlabel.get_window_extent(renderer)
    for name, box in boxes.items():
        inside = (
            box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        )
        assert inside, f"{name} runs off the edge: {box} of {figure.bbox}"
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        overlap = first.intersection(first.padded(-2), second.padded(-2))
        assert overlap is None or not overlap.width or not overlap.height, f"{one} covers {other}"
    assert figure.axes
    for axes in figure.axes:
        check_panel(axes)
    handles = [
        (handle.get_color(), handle.get_linestyle(), handle.get_marker(), handle.get_markerfacecolor())
        if isinstance(handle, Line2D)
        else handle.get_facecolor()
        for handle in legend.legend_handles
    ]
    assert len(set(handles)) == len(handles), "lines cannot be told apart"
    width, height = figure.get_size_inches()
    assert width < 21 and height < 13


def check_panel(axes):
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    points = [np.asarray(line.get_xydata(), float) for line in lines]
    bars = [patch for patch in axes.patches if patch.get_height()]
    assert bars or sum(np.isfinite(xy).all(axis=1).sum() for xy in points), "a panel has no point"
    for line, xy in zip(lines, points, strict=True):
        if line.get_marker():
            reach = line.get_markersize() / 2 * axes.figure.dpi / 72
            places = axes.transData.transform(xy)
            assert (places >= axes.bbox.min + reach).all() and (places <= axes.bbox.max - reach).all(), "cut"
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        assert ticks and (axis.get_label().get_text() or axes.patches or axes.get_shared_y_axes())
        labels = [axis.get_major_formatter()(tick) for tick in ticks]
        assert len(set(labels)) == len(labels), f"ticks say the same: {labels}"


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


# Overlap and benchmarks


@pytest.mark.parametrize(("distances", "layers", "error"), [(1, 1, None), (8, 30, 0.01)])
def test_overlap(drawn, distances, layers, error):
    def rows(share):
        part = {"loaded": {"mean": share, "error": error}, "next": {"mean": 1 - share, "error": error}}
        return [{"distance": distance} | part for distance in range(1, distances + 1)]

    by_layer = {str(layer): rows(layer / max(1, layers - 1)) for layer in range(layers)}
    values = {"model": PATH, "dtype": "float32", "texts": ["a"] * 9, "tokens": 96, "prompt_tokens": 32}
    values |= {"config": {"budget_tokens": 32, "page_size": 8, "sink_pages": 1}, "mean": rows(1.0)}
    assert list(overlap_pictures(values | {"layers": by_layer})) == ["overlap.png"]
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize(("windows", "layers", "error"), [((1,), 1, None), ((1, 2, 4, 8), 30, 0.01)])
def test_distances(drawn, windows, layers, error):
    def points(ages, value):
        point = {"mean": value, "error": error}
        return [point | {"age": age, "layers": [point] * layers} for age in ages]

    def case(window):
        config = {"page_size": 16, "dense_layers": 2}
        ages = {name: (0, 1, 64) if name in IN_CACHE else range(window) for name in QUANTITIES}
        return {"config": config} | {name: points(ages[name], 1 / window) for name in QUANTITIES}

    values = {"model": PATH, "dtype": "float32", "texts": ["a"] * 9, "tokens": 300, "prompt_tokens": 32}
    values |= {"ages": [0, 1, 64], "sparse_layers": [*range(2, 2 + layers)]}
    cases = {f"mean-key-w{window}-s1-b256": case(window) for window in windows}
    assert list(distances_pictures(values | {"cases": cases})) == ["distances.png"]
    assert len(drawn[0].axes) == 2 * len(QUANTITIES)
    assert "192 tokens of each after a prompt of 32" in " ".join(drawn[0].get_supxlabel().split())


@pytest.mark.parametrize(("contexts", "names"), [([64], 1), ([512, 1000, 1024, 131072], 24)])
def test_latency(drawn, contexts, names):
    methods = ["full", "quest", *(f"retro w={window}" for window in range(names))][: max(names, 1)]
    measured = [
        {
            "context": context,
            "contestants": {
                name: {"ms_per_step": 5.0 + place, "ms_10_90": [4.0 + place, 7.0 + place], "kv_bytes": None}
                for place, name in enumerate(methods)
            },
            "milliseconds": {name: [[5.0] * 3] * 2 for name in methods},
        }
        for context in contexts
    ]
    values = {"model": PATH, "dtype": "float32", "batch": 2, "contexts": measured}
    assert list(latency_pictures(values | {"provenance": {"device": "cpu: " + "c" * 90}}, "bench")) == [
        "bench.png"
    ]
    assert len(drawn[0].axes) == 1  # no traffic is known
    assert "n = 6 steps of each" in drawn[0].get_supxlabel()


@pytest.mark.parametrize(("contexts", "slots"), [([64], (8,)), ([64, 1024, 131072], (1, 8, 32, 64, 256))])
def test_throughput(drawn, contexts, slots):
    def row(number, name, size):
        many = None if "verified" in name else 90.0 * size**0.8 / (1 + number)
        limit = None if many is None else 2 * many
        row = {"context": number, "name": name, "slots": size, "fixed_tokens_per_s": 40.0 * size}
        return row | {"many_seconds": many, "many_tokens_per_s": many, "limit_tokens_per_s": limit}

    names = ["full", "quest", "preset paper", "preset mean-key", "preset mean-key, verified"]
    values = {
        "model": PATH,
        "dtype": "bfloat16",
        "replies": [16, 1024],
        "contexts": [{"prompts": [context, context + number]} for number, context in enumerate(contexts)],
        "rows": [
            row(number, *each) for number in range(len(contexts)) for each in itertools.product(names, slots)
        ],
        "provenance": {"device": "cpu: " + "c" * 90},
    }
    assert list(throughput_pictures(values)) == ["throughput.png"]
    assert len(drawn[0].axes) == len(contexts) and len(drawn[0].axes[0].get_lines()) == 9
    assert "n = 2 replies of 16 to 1024 tokens" in " ".join(drawn[0].get_supxlabel().split())


@pytest.mark.parametrize(("chips", "files"), [(1, 1), (8, 2)])
def test_static(drawn, chips, files):
    rows = [
        {
            "chip": f"v{chip}",
            "page_size": 16,
            "context": context,
            "method": f"{method} w={window}" if window else method,
            "config": {"method": method, "window": window},
            "parts": [{"name": name, "layers": 2, "time": 1e-3 * (1 + chip)} for name in PARTS],
        }
        for chip in range(chips)
        for context in (1000, 131072)
        for method, window in (("full", None), ("quest", None), ("retro", 2))
    ]
    values = {"model": "llama3.1-8b", "budget": 0.15, "devices": 1, "batch": 1, "rows": rows}
    assert len(static_pictures(values)) == files


@pytest.mark.parametrize("windows", [(4,), (1, 2, 4, 8, 16, 32, 64, 128)])
def test_roofline(drawn, windows):
    def row(operation, size, window, implementation, baseline=None):
        rate = 50.0 if operation == "update" else 2000.0
        row = {
            "operation": operation,
            "window": window,
            "implementation": implementation,
            "baseline": baseline,
        }
        return row | {"bytes": size * 1e6, "gb_per_s": rate * (1 + size / 99)}

    sizes = (16,) if len(windows) == 1 else (16, 17, 200)
    rows = [
        row("attention", size, w, name) for size in sizes for w in windows for name in ("mosaic_gpu", "xla")
    ]
    rows += [
        row("attention", 16, None, f"{name} (a)", name) for name in ("FlashInfer", "torch SDPA", "jax.nn")
    ]
    rows += [
        row(operation, size, None, "xla") for operation in ("dense", "select", "update") for size in sizes
    ]
    dims = {"dtype": "bfloat16", "kv_heads": 8, "group": 4, "head_dim": 128, "page_size": 16}
    values = {"rows": rows, "dimensions": dims, "calls": 50, "ceiling_gb_per_s": 3200.0}
    assert list(roofline_pictures(values | {"provenance": {"device": "gpu: g"}})) == ["roofline.png"]
    ceilings = [
        [line for line in axes.get_lines() if line.get_ydata()[0] == 3200.0] for axes in drawn[0].axes
    ]
    assert [len(found) for found in ceilings] == [1, 1, 1, 0]  # far above what an update reaches
    assert all(axes.get_ylim()[1] > 3300 for axes in drawn[0].axes[:3])
