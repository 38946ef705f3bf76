"""Predicted decode steps: what they are made of, from given schedules; and a real schedule of selection."""

import dataclasses
import json

import pytest

from pallas_kernels.tpu import CHIPS
from retro_jax import DecodeConfig, preset
from retro_jax.experiments.cli import main
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu import model as tpu_model
from retro_jax.experiments.tpu import selection as tpu_selection
from retro_jax.experiments.tpu.schedule import Schedule, parse
from retro_jax.experiments.tpu.selection import SelectionSchedule, measure
from retro_jax.models import LayerKind
from retro_jax.models.presets import SIZES

MODEL = SIZES["llama3.1-8b"]
SLOW = Schedule(block=3000, item=200, pages=32, spills=0)
FAST = Schedule(block=10, item=2, pages=32, spills=0)
SELECTION = SelectionSchedule(block=500, chunk=142, search_chunk=47, search_pass=63, places=362, once=365)


@pytest.fixture
def scheduled(monkeypatch):
    """Schedules of a fast kernel for a window of 1 and a slow one beyond."""
    monkeypatch.setattr(tpu_compiler, "installed", lambda: True)
    monkeypatch.setattr(
        tpu_model, "_schedule", lambda chip, size, dim, group, window, dense: FAST if window == 1 else SLOW
    )
    monkeypatch.setattr(tpu_model, "_selection", lambda chip, **_: SELECTION)


def parts_of(config, **changes):
    arguments = {"chip": CHIPS["v5e"], "context": 32768, "devices": 1, "batch": 1} | changes
    return {part.name: part for part in tpu_model.decode_step(MODEL, config, **arguments)}


def test_full_attention_reads_weights_and_the_whole_cache(scheduled):
    parts = parts_of(DecodeConfig("full", page_size=32))
    assert parts.keys() == {"weights", "dense attention", "update"}
    assert parts["dense attention"].layers == MODEL.num_layers
    assert parts["dense attention"].bytes == 32768 * 2 * 8 * 128 * 2
    parameters = 8_030_261_248 - 128256 * 4096  # without the embedding
    assert parts["weights"].bytes == pytest.approx(2 * parameters, rel=1e-6)
    assert parts["weights"].time == pytest.approx(2 * parameters / 819e9, rel=1e-6)


def test_windows_are_read_whole_and_no_more(scheduled):
    kinds = (LayerKind(window=1024), LayerKind(), LayerKind(), LayerKind(window=1024))
    model = dataclasses.replace(
        MODEL, num_layers=4, rope_theta=10_000.0, rope_scaling=None, layer_kinds=kinds
    )
    config = DecodeConfig("retro", window=4, page_size=32, dense_layers=1)
    parts = tpu_model.decode_step(model, config, CHIPS["v5e"], 32768, 1, 1)
    windows = [part for part in parts if part.name == "window attention"]
    page = 32 * 2 * 8 * 128 * 2
    assert [(part.layers, part.bytes) for part in windows] == [(1, 32 * page), (1, 33 * page)]
    assert {part.name: part.layers for part in parts}["dense attention"] == 1
    short = tpu_model.decode_step(model, config, CHIPS["v5e"], 64, 1, 1)
    assert {part.bytes for part in short if part.name == "window attention"} == {2 * page}


def test_sparse_attention_reads_its_budget_and_statistics(scheduled):
    parts = parts_of(DecodeConfig("quest", page_size=32, budget=0.125))
    pages = 32768 // 8 // 32
    assert parts["attention"].bytes == pages * 32 * 2 * 8 * 128 * 2
    assert parts["selection"].bytes == 1024 * 2 * 8 * 128 * 2
    assert parts["attention"].layers == parts["selection"].layers == MODEL.num_layers - 2
    assert parts["attention"].binds == "memory"
    slow = parts_of(DecodeConfig("retro", window=4, page_size=32, budget=0.125))["attention"]
    assert slow.bytes == parts["attention"].bytes
    assert slow.binds == "issue"
    assert slow.bundles == 8 * (pages // 32 * SLOW.block + SLOW.item)


def test_a_preset_selects_by_its_own_statistics(scheduled, monkeypatch):
    """8-bit mean keys with a scale are 132 bytes a page, and what that saves is spent on pages."""
    asked = []
    monkeypatch.setattr(tpu_model, "_selection", lambda chip, **by: asked.append(by) or SELECTION)
    config = preset("mean-key", budget=0.125)
    part = parts_of(config)["selection"]
    assert part.bytes == 2048 * 132 * 8
    assert {(by["score"], by["kind"], by["group_reduce"]) for by in asked} == {
        ("mean_key", "mean_key_int8", "mass")
    }
    quest = parts_of(DecodeConfig("quest", budget=0.125))
    assert parts_of(config)["attention"].bytes > quest["attention"].bytes
    assert quest["selection"].bytes == 2048 * 512 * 8


def test_devices_and_cores_share_the_heads(scheduled):
    config = DecodeConfig("quest", page_size=32)
    one, four = parts_of(config), parts_of(config, devices=4)
    two_cores = parts_of(config, chip=CHIPS["v4"])
    assert four["attention"].bytes * 4 == one["attention"].bytes == two_cores["attention"].bytes
    assert four["weights"].bytes == one["weights"].bytes // 4
    assert two_cores["attention"].bundles * 2 == one["attention"].bundles


def test_the_command_writes_its_results_once(scheduled, tmp_path, capsys):
    flags = ["bench", "tpu-static", "--chips", "v5e", "--contexts", "32768", "--out", str(tmp_path / "out")]
    flags += ["--presets", "mean-key"]
    main(flags)
    assert "| v5e" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "full",
        "quest",
        "retro w=2",
        "retro w=4",
        "retro w=8",
        "mean-key",
    ]
    assert [row["config"]["window"] for row in rows] == [None, 1, 2, 4, 8, None]
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["seconds"] == pytest.approx(sum(p["layers"] * p["time"] for p in row["parts"]))
    with pytest.raises(SystemExit):
        main(flags)
    assert "is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chips", "v9"], "--chips 'v9' is unknown; use v4, v5e"),
        (["--model", "gpt"], "--model 'gpt' is unknown"),
        (["--devices", "3"], "8 KV heads of llama3.1-8b do not divide over 3 devices"),
        (["--contexts", "1000"], "1000 tokens is not a multiple of pages of 16"),
        (["--windows", "0"], "must be 1 or more"),
        (["--presets", "meankey"], "preset 'meankey' is unknown (did you mean 'mean-key'?)"),
    ],
)
def test_bad_flags_are_named(scheduled, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["bench", "tpu-static", *flags])
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_the_compiler_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(tpu_compiler, "installed", lambda: False)
    with pytest.raises(SystemExit):
        main(["bench", "tpu-static"])
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_the_longest_search_is_counted():
    pages, selected = 4096, 600
    expected = 365 + 4 * 142 + 11 * (63 + 4 * 47) + 5 * 362
    assert SELECTION.choice(pages, selected) == expected


def test_a_schedule_with_other_loops_is_refused():
    with pytest.raises(RuntimeError, match="other loops than expected"):
        measure(parse("   0x1 LB: > {}\n   0x2 LB: >> {}\n   0x3   :  {}\n"), 1)


@pytest.mark.skipif(not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test")
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("by", "least", "most"),
    [
        # Beside 41 us that the statistics of 8 heads take to arrive.
        ({"score": "bounds", "kind": "min_max", "group_reduce": "mean"}, 2e-6, 12e-6),
        # Beside 10.6 us.
        ({"score": "mean_key", "kind": "mean_key_int8", "group_reduce": "mass"}, 3e-6, 13e-6),
    ],
)
def test_selection_has_the_loops_that_are_counted(by, least, most):
    schedule = tpu_selection.selection("v5e", block=512, heads=8, group=4, dim=128, **by)
    assert min(vars(schedule).values()) > 0
    assert schedule.block < 512 * 8 * 256 / CHIPS["v5e"].bytes_per_bundle  # a mean key in bfloat16
    assert least < schedule.choice(8192, 1229) / CHIPS["v5e"].clock < most


def test_shares_are_counted_for_each_head_of_a_group():
    choice = ["LB: >> {}", "LB: >> {}", "LB: >>> {}", "LB: >> {}", "LB: >> {}", "LB: >> {}"]
    shares = ["LB: >> {}", *["LB: >>> {}"] * 3]
    without, with_shares = (
        measure(parse("\n".join(f"0x{i} {line}" for i, line in enumerate(["LB: > {}", *lines]))), 4)
        for lines in (choice, [*shares, *choice])
    )
    assert with_shares.chunk == without.chunk + 4 * 3
    assert with_shares.once == without.once + 4
    assert with_shares.search_chunk == without.search_chunk == 1
