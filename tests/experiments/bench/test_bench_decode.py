import os
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import retro_jax.experiments.bench.decode
from retro_jax.drafts import weight_bytes
from retro_jax.experiments.bench.decode import (
    BenchDecode,
    agreement,
    results,
    take_turns,
)
from retro_jax.experiments.bench.decode_report import speed_report, speed_table
from retro_jax.experiments.bench.device_time import Executed
from retro_jax.experiments.bench.transformers_export import export
from retro_jax.methods import METHODS
from retro_jax.models import Experts, LayerKind, Model, ModelConfig, RopeScaling, random_params
from retro_jax.models.experts import expert_bytes
from retro_jax.models.presets import SIZES

SHORT = ("--contexts", 40, "--steps", 2, "--rounds", 2, "--budget-tokens", 32, "--ceiling-bytes", 1 << 20)


class Clock:
    """A contestant whose every step takes the same time."""

    scan = None

    def __init__(self, name, milliseconds, turns):
        self.name, self.milliseconds, self.turns = name, milliseconds, turns

    def steps(self, count):
        self.turns.append(self.name)
        return [self.milliseconds] * count, [[0]] * count


class Clocked(Clock):
    """In the place of a method of this library."""

    kv_bytes = expert_bytes = None

    def __init__(self, name, *_):
        super().__init__(name, 1.0, [])


def test_contestants_take_turns_in_changing_order():
    turns = []
    contestants = [Clock(name, 1.0, turns) for name in "abc"]
    milliseconds, tokens = take_turns(contestants, rounds=3, steps=2, progress=lambda *_: None)
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab"  # warm-up first
    assert milliseconds["b"] == [[1.0, 1.0]] * 3
    assert len(tokens["b"]) == 3 + 3 * 2


def test_ratios_are_medians_over_rounds():
    times = {"a": [[2.0, 2.0, 90.0], [4.0, 4.0, 4.0]], "b": [[1.0, 1.0, 1.0], [4.0, 4.0, 80.0]]}
    found = results(times, [["a", "b"]])
    assert found["a"]["ms_per_step"] == 4.0
    assert found["a"]["time_over"] == {"a": 1.0, "b": 1.5}  # rounds: 2/1 and 4/4
    assert found["b"]["time_over"]["a"] == 0.75
    apart = results(times, [["a"], ["b"]])
    assert apart["a"]["time_over"] == {"a": 1.0, "b": 4.0 / 2.5}  # rounds are no pairs: of medians


def test_agreement():
    assert agreement([[1], [2], [3]], [[1], [2], [4]]) == 2
    assert agreement([[1], [2]], [[1], [2]]) == 2


def test_speed_table():
    found = results({"full": [[10.0]], "retro": [[25.0]]}, [["full", "retro"]])
    found["full"] |= {"kv_bytes": 2.5e6, "limit_ms": 8.0, "scan_ms": 9.5}
    found["retro"] |= {"kv_bytes": None, "limit_ms": None, "scan_ms": None}
    lines = speed_table(found, 2, [["full", "retro"]]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    full = ["full", "10.00", "10.00-10.00", "200.0", "2.50", "8.00", "0.80", "9.50", "1.00", "0.40"]
    retro = ["retro", "25.00", "25.00-25.00", "80.0", "", "", "", "", "2.50", "1.00"]
    assert cells[2:] == [full, retro]
    found["full"] |= {"busy_ms": 9.25, "launches": 351.2, "kernels": {}}
    lines = speed_table(found, 2, [["full", "retro"]]).splitlines()
    header, _, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[8:10] == ["busy ms", "launches"]
    assert cells == [[*full[:8], "9.25", "351", *full[8:]], [*retro[:8], "", "", *retro[8:]]]
    assert re.findall(r"~[\d.]+", speed_table(found, 2, [["full"], ["retro"]])) == ["~0.40", "~2.50"]


def test_groups_that_fit_follow_each_other(json_command, failure, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Held(Clocked):
        def __init__(self, name, *_):
            super().__init__(name)
            self.milliseconds += len(most)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(retro_jax.experiments.bench.decode, "Ours", Held)
    flags = ("bench", "decode", "random:tiny", *SHORT, "--together", 2, "--contexts", 40)
    values = json_command(*flags, "--methods", "full", "quest", "streaming")
    (measured,) = values["contexts"]
    names = ["full", "quest-b32", "streaming-b32"]
    assert measured["groups"] == [names[:2], names[2:]] and list(measured["contestants"]) == names
    assert most == [1, 2, 1]  # caches of a group are gone before those of the next are made
    assert measured["contestants"]["full"]["time_over"] == dict(zip(names, (1.0, 1 / 2, 1 / 3), strict=True))
    report = speed_report(values)
    assert "one after another: full, quest-b32; then streaming-b32. Between groups (~)" in report
    assert "~0.33" in report and "one after another" not in speed_report(
        values | {"contexts": [measured | {"groups": [names]}]}
    )
    assert "--together 0 is below 1; leave it out" in failure(*flags[:-4], "--together", 0)


def test_noise_is_decoded_instead_of_a_prompt(json_command, failure, monkeypatch):
    monkeypatch.setattr(retro_jax.experiments.bench.contestants, "run_prefill", None)
    told = Executed(0.5, 12.0, {"kernel": (12.0, 500.0)})
    monkeypatch.setattr(retro_jax.experiments.bench.contestants, "executed", lambda *_, **__: told)
    flags = ("bench", "decode", "random:tiny", *SHORT, "--no-prefill", "--methods", "full")
    values = json_command(*flags)
    row = values["contexts"][0]["contestants"]["full"]
    assert row["kv_bytes"] == (40 + 3 + 4) * 4 * 2 * (2 * 16 * 4)
    assert (row["busy_ms"], row["launches"], row["kernels"]) == (0.5, 12.0, {"kernel": [12.0, 500.0]})
    assert "40 tokens of noise as context" in speed_report(values)
    evicting = failure(*flags, "h2o")
    assert "h2o-b32 keeps what a prompt tells it to; leave it or --no-prefill out" in evicting
    assert "leave --no-prefill out" in failure(*flags, "--reference", sys.executable)


def test_what_follows_the_table_is_apart_from_it(command, monkeypatch):
    monkeypatch.setattr(retro_jax.experiments.bench.decode, "Ours", Clocked)
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0, 0))
    _, out, err = command("bench", "decode", "random:tiny", *SHORT, "--methods", "full", "--no-scan")
    assert re.search(r"\|\n\nTimes are medians of 4 steps", out)
    assert "\n\nThe machine was busy: load 1000.0 on" in out + err


def test_bench_decode(json_command, failure, tmp_path, monkeypatch):
    out = tmp_path / "more" / "bench.json"
    released = []
    monkeypatch.setattr(retro_jax.experiments.bench.decode, "release", lambda: released.append(True))
    flags = ("--methods", "full", "retro", "--windows", 2, "--page-size", 8, "--out", out)
    values = json_command("bench", "decode", "random:tiny", *SHORT, *flags, "--contexts", 40, 80)
    assert [measured["context"] for measured in values["contexts"]] == [40, 80]
    assert len(released) == 2  # the programs of many contexts do not pile up
    for measured in values["contexts"]:
        assert list(measured["contestants"]) == ["full", "retro-w2-b32-p8"]
        assert [len(turns) for turns in measured["milliseconds"].values()] == [2, 2]
        assert all(row["ms_per_step"] > 0 for row in measured["contestants"].values())
        assert all(row["scan_ms"] > 0 for row in measured["contestants"].values())
        assert measured["reference"] is None and measured["torch"] is None
        weights = values["weight_bytes"]
        for row in measured["contestants"].values():
            limit = (weights + row["kv_bytes"]) / values["ceiling_gb_per_s"] / 1e6
            assert row["limit_ms"] == pytest.approx(limit)
    short, long = (
        {name: row["kv_bytes"] for name, row in measured["contestants"].items()}
        for measured in values["contexts"]
    )
    assert (values["warm_up_steps"], values["rounds"], values["steps_per_round"]) == (3, 2, 2)
    assert "medians of 4 steps, 2 turns of 2, after 3 to warm up, which are not timed" in speed_report(values)
    # 4 layers, 2 KV heads of 16 channels, float32; after 40 + 3 + 4 tokens.
    assert short["full"] == 47 * 4 * 2 * (2 * 16 * 4)
    assert long["full"] == 87 * 4 * 2 * (2 * 16 * 4)
    assert long["retro-w2-b32-p8"] < long["full"]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for file in (out, out.with_suffix(".png")):
        line = failure("bench", "decode", "random:tiny", *SHORT, "--out", out)
        assert f"{file} exists and is not overwritten" in line
        file.unlink()


def test_the_limit_has_the_weights_of_chosen_experts_only(json_command, monkeypatch):
    config = ModelConfig("few", 64, 1, 2, 2, 8, 16, 16, max_positions=128, experts=Experts(8, 2, 8))
    monkeypatch.setitem(SIZES, "few-experts", config)
    flags = ("--methods", "full", "--page-size", 8, "--no-scan", "--batch", 2)
    values = json_command("bench", "decode", "random:few-experts", *SHORT, *flags)
    row = values["contexts"][0]["contestants"]["full"]
    # Each of the two sequences chooses two.
    assert row["expert_bytes"] / expert_bytes(config) in (2, 3, 4)
    params = random_params(config, jax.random.key(0))
    assert values["weight_bytes"] == weight_bytes(
        params.replace(embed=None), config, 8**9
    ) - 8 * expert_bytes(config)
    read = values["weight_bytes"] + row["expert_bytes"] + 2 * row["kv_bytes"]
    assert row["limit_ms"] == pytest.approx(read / values["ceiling_gb_per_s"] / 1e6)
    table = speed_table({"full": row | {"time_over": {"full": 1.0}}}, 2, [["full"]])
    assert "experts GB/step" in table


def test_each_of_several_devices_reads_its_part(json_command, monkeypatch):
    config = ModelConfig("halves", 64, 1, 2, 2, 8, 16, 16, max_positions=128)
    monkeypatch.setitem(SIZES, "halves", config)
    flags = ("--methods", "full", "--page-size", 8, "--no-scan", "--batch", 2)
    values = json_command(
        "bench", "decode", "random:halves", *SHORT, *flags, "--data-devices", 2, "--model-devices", 2
    )
    row = values["contexts"][0]["contestants"]["full"]
    norms = 4 * 3 * config.width  # of float32, on every device
    read = norms + (values["weight_bytes"] - norms) / 2 + row["kv_bytes"] / 2
    assert row["limit_ms"] == pytest.approx(read / values["ceiling_gb_per_s"] / 1e6)
    assert "GB/s on each of 4 devices" in speed_report(values)


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (("--data-devices", 2), "--batch 1 does not divide over --data-devices 2; use a multiple"),
        (("--model-devices", 2, "--torch", "python"), "--reference and --torch decode on one device"),
        (("--model-devices", 4), "num_kv_heads 2 does not divide over 4 devices .* one of 1, 2"),
        (("--model-devices", 8), "ask for 8 devices, this process has 4"),
    ),
)
def test_devices_that_do_not_fit_are_refused_before_anything_is_loaded(failure, monkeypatch, flags, said):
    monkeypatch.setattr("retro_jax.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert re.search(said, failure("bench", "decode", "random:tiny", *SHORT, *flags))


def test_all_methods_and_windows_can_take_turns():
    names = BenchDecode(model="m", methods=tuple(METHODS), windows=(2, 8)).configurations()
    evicting = ["streaming", "tova", "h2o", "snapkv", "expected"]
    assert list(names) == ["full", "quest", "retro-w2", "retro-w8", *evicting]
    assert [config.slots for config in names.values()] == [1, 1, 2, 8, *[1] * len(evicting)]


def test_what_a_method_does_not_have_is_for_the_others():
    bench = BenchDecode(model="m", windows=(1, 4), presets=("mean-key",))
    common = replace(bench.config, revised_layers=0.5, anchor_every=3)
    found = replace(bench, config=common).configurations()
    assert {name: (own.revised_layers, own.anchor_every) for name, own in found.items()} == {
        "full": (1.0, 1),
        "quest-anchors3": (1.0, 3),
        "retro-w1-anchors3": (1.0, 3),
        "retro-w4-anchors3-revised0.5": (0.5, 3),
        "preset mean-key-anchors3": (1.0, 3),
    }
    told = r"0\.5 was asked for, which none of full, quest, preset mean-key has; add retro, or leave --rev"
    with pytest.raises(ValueError, match=told):
        replace(bench, config=common, methods=("full", "quest")).configurations()
    with pytest.raises(ValueError, match="and a window of 1, which revises nothing; use a wider window"):
        replace(bench, config=common, methods=("full", "retro"), windows=(1,)).configurations()


def test_bench_refuses(failure, tmp_path):
    for flags, message in {
        ("--steps", 0): "--steps is 0; it must be 1 or more",
        ("--contexts",): "--contexts has no value; give at least one",
        ("--seed", -1): "--seed is -1; it must be 0 or more",
        ("--methods",): "there is nothing to measure; name --methods or --presets",
    }.items():
        assert message in failure("bench", "decode", "random:tiny", *flags)
    arguments = ("bench", "decode", "random:tiny", *SHORT, "--reference")
    assert "name an interpreter" in failure(*arguments, tmp_path / "python")
    assert "add full to --methods" in failure(*arguments, tmp_path / "python", "--methods", "quest")
    assert "method 'best' is unknown" in failure("bench", "decode", "random:tiny", "--methods", "best")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_reference_that_fails_says_why(failure, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch' >&2\nexit 1\n")
    python.chmod(0o755)
    line = failure("bench", "decode", "random:tiny", *SHORT, "--reference", python)
    assert "--reference failed: ModuleNotFoundError: no torch" in line


OTHER = """
import json, sys
sizes = json.loads(sys.argv[2])
assert sizes["batch"] == 1 and sizes["num_layers"] == 4 and sizes["dtype"] == "float32"
print(json.dumps({"version": "torch of a test"}), flush=True)
for line in sys.stdin:
    steps = json.loads(line)["steps"]
    print(json.dumps({"milliseconds": [4.0] * steps, "tokens": [[0]] * steps}), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_a_step_of_torch_takes_turns(json_command, tmp_path):
    python = tmp_path / "python"
    (tmp_path / "other.py").write_text(OTHER)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/other.py" "$@"\n')
    python.chmod(0o755)
    flags = ("--methods", "full", "--torch", python, "--no-scan")
    values = json_command("bench", "decode", "random:tiny", *SHORT, *flags)
    (measured,) = values["contexts"]
    assert measured["torch"] == "torch of a test"
    row = measured["contestants"]["torch"]
    assert row["ms_per_step"] == 4.0 and row["scan_ms"] is None
    # It reads the whole cache of 40 + 3 + 4 tokens.
    read = values["weight_bytes"] + 47 * 4 * 2 * (2 * 16 * 4)
    assert row["limit_ms"] == pytest.approx(read / values["ceiling_gb_per_s"] / 1e6)


def test_an_embedding_that_is_not_the_head_is_not_read():
    for tied in (False, True):
        model = small(tie_embeddings=tied)
        embed = model.params.embed.nbytes
        whole = sum(weight.nbytes for weight in jax.tree.leaves(model.params))
        assert weight_bytes(model.params, model.config, 1) == (whole if tied else whole - embed)


def small(**features):
    config = ModelConfig("small", 64, 2, 4, 2, 8, 32, 48, max_positions=128, **features)
    return Model(config, random_params(config, jax.random.key(0)), None)


def test_export_refuses_what_it_does_not_cover(tmp_path):
    with pytest.raises(ValueError, match=r"scales its rotary embedding \(linear\)"):
        export(small(rope_scaling=RopeScaling("linear", factor=2.0)), tmp_path)
    with pytest.raises(ValueError, match=r"the layers of small are of kinds that the export"):
        export(small(layer_kinds=(LayerKind(), LayerKind(None))), tmp_path)
    with pytest.raises(ValueError, match=r"small has norms 'both', logits_divisor 8\.0, which the export"):
        export(small(norms="both", logits_divisor=8.0), tmp_path)


@pytest.mark.parametrize(
    "features", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True, "tie_embeddings": True}]
)
def test_an_exported_model_is_read_back(tmp_path, features):
    from retro_jax.models.formats.huggingface import load_folder

    model = small(**features)
    export(model, tmp_path)
    read = load_folder(tmp_path)
    assert read.config.qkv_bias == model.config.qkv_bias
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(read.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_transformers_decode_the_same_tokens(json_command):
    python = os.environ.get("RETRO_JAX_REFERENCE_PYTHON")
    if not python or not Path(python).exists():
        pytest.skip("RETRO_JAX_REFERENCE_PYTHON names no interpreter with torch and transformers")
    values = json_command("bench", "decode", "random:tiny", *SHORT, "--reference", python)
    (measured,) = values["contexts"]
    assert measured["reference"].startswith("transformers ")
    assert measured["reference_agrees_for_steps"] == 7
