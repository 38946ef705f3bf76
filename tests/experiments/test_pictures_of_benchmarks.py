"""Pictures of analyses and benchmarks; what all of them must hold: `drawn.py`."""

import itertools

import pytest

from retro_jax.experiments.analyses.distances_shown import IN_CACHE, QUANTITIES, distances_pictures
from retro_jax.experiments.analyses.overlap import overlap_pictures
from retro_jax.experiments.bench.decode_report import latency_pictures
from retro_jax.experiments.bench.roofline import roofline_pictures
from retro_jax.experiments.bench.throughput_report import throughput_pictures
from retro_jax.experiments.pictures.panels import FULL, QUEST
from retro_jax.experiments.tpu.command import PARTS, static_pictures
from tests.experiments.drawn import PATH


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
    methods = ["full", "quest-p8", *(f"retro-w{window}-p8" for window in range(names))][: max(names, 1)]
    configs = {name: {"method": name.partition("-")[0]} for name in methods}
    measured = [
        {
            "context": context,
            "contestants": {
                name: {"ms_per_step": 5.0 + place, "ms_10_90": [4.0 + place, 7.0 + place], "kv_bytes": None}
                for place, name in enumerate(methods)
            },
            "milliseconds": {name: [[5.0] * 3] * 2 for name in methods},
            "groups": [[name] for name in methods] if len(contexts) > 1 else [methods],
        }
        for context in contexts
    ]
    values = {"model": PATH, "dtype": "float32", "batch": 2, "contexts": measured, "configs": configs}
    assert list(latency_pictures(values | {"provenance": {"device": "cpu: " + "c" * 90}}, "bench")) == [
        "bench.png"
    ]
    assert len(drawn[0].axes) == 1  # no traffic is known
    told = " ".join(drawn[0].get_supxlabel().split())
    assert "n = 6 timed steps of each, in 2 turns" in told
    assert ("groups one after another" in told) == (len(contexts) > 1)
    lines = {line.get_label(): line.get_color() for line in drawn[0].axes[0].get_lines()}
    known = {"full": FULL.colour, "quest-p8": QUEST.colour}
    assert all(lines[name] == known[name] for name in methods[:2])


@pytest.mark.parametrize(("contexts", "slots"), [([64], (8,)), ([64, 1024, 131072], (1, 8, 32, 64, 256))])
def test_throughput(drawn, contexts, slots):
    def row(number, name, size):
        many = None if "verified" in name else 90.0 * size**0.8 / (1 + number)
        limit = None if many is None else 2 * many
        row = {"context": number, "name": name, "slots": size, "fixed_tokens_per_s": 40.0 * size}
        return row | {"many_seconds": many, "many_tokens_per_s": many, "limit_tokens_per_s": limit}

    configs = {name: {"method": name} for name in ("full", "quest")} | {
        "preset mean-key": {"method": "quest"}
    }
    names = ["full", "quest", "preset paper", "preset mean-key", "preset mean-key, verified"]
    values = {
        "model": PATH,
        "dtype": "bfloat16",
        "configs": configs,
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
