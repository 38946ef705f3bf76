import json
from dataclasses import replace

import numpy as np
import pytest

from retro_jax.experiments.bench.throughput import Asked, BenchThroughput, spread
from retro_jax.experiments.bench.throughput_report import Bytes, Made, compared, parted, throughput_report

SHORT = ("--prompts", 5, "--prompt-tokens", 3, 9, "--reply-tokens", 2, 12, "--slots", 2, "--page-size", 8)
SHORT += ("--ceiling-bytes", 1 << 20)


def test_lengths_are_spread_over_the_scale():
    lengths = spread(np.random.default_rng(0), 16, 1024, 7)
    assert sorted(lengths) == [16, 32, 64, 128, 256, 512, 1024] and lengths != sorted(lengths)


def test_the_gain_of_slots_that_are_never_idle():
    asked = Asked([np.zeros(3)] * 5, (4, 1, 1, 2, 8))
    assert asked.most_gain(2) == 2 * (4 + 2 + 8) / 16
    assert asked.most_gain(8) == 1  # one batch, as long as its longest reply either way


def test_a_window_is_for_the_methods_that_have_one():
    bench = BenchThroughput(model="m", methods=("full", "quest", "retro"))
    found = replace(bench, config=replace(bench.config, window=2, anchor_every=3)).configurations()
    assert {name: (config.slots, config.anchor_every) for name, config in found.items()} == {
        "full": (1, 1),
        "quest-anchors3": (1, 3),
        "retro-w2-anchors3": (2, 3),
    }


def test_where_replies_part():
    fixed = Made([[1, 2, 3], [4, 5]], [[-1.0, -2.0, -3.0], [-1.0, -1.0]], 1.0)
    many = Made([[1, 7, 3], [4, 5]], [[-1.0, -2.25, -3.0], [-1.0, -1.0]], 1.0)
    assert parted(fixed, many) == [{"reply": 0, "after": 1, "gap": 0.25}] and parted(fixed, fixed) == []


def test_what_the_bytes_allow():
    asked = Asked([np.zeros(3)] * 4, (6, 2, 2, 2))
    fixed, many = Made([], [], 6.0), Made([], [], 3.0, kv_bytes=4e9)
    row = compared("full", 2, asked, fixed, many, Bytes(weights=2 * 10**9, gb_per_s=8.0))
    # Twelve tokens of two slots: six times the weights.
    assert row["limit_tokens_per_s"] == 12 / (6 * 2 + 4) * 8 and row["cache_share"] == 4 / 16
    assert (row["gain"], row["most_gain"], row["many_tokens_per_s"]) == (2.0, 8 / 6, 4.0)
    assert compared("full", 2, asked, fixed, None, Bytes(1, 1.0))["gain"] is None


def test_bench_throughput(json_command, failure, tmp_path):
    out = tmp_path / "throughput"
    flags = ["--methods", "quest", "--contexts", 9, "--verify", 2, "--dense-layers", 0]
    values = json_command(
        "bench", "throughput", "random:tiny", *SHORT, *flags, "--dtype", "float32", "--out", out
    )
    assert values == json.loads((out / "results.json").read_text())
    row, verified = values["rows"]
    assert verified["name"] == "quest-p8, verified" and verified["gain"] is None
    assert values["contexts"][0]["prompts"] == [9] * 5 and 0 < row["cache_share"] < 1
    assert (out / "throughput.png").stat().st_size
    assert row["tokens"] == sum(values["replies"]) and sorted(values["replies"])[::4] == [2, 12]
    assert row["gain"] == pytest.approx(row["many_tokens_per_s"] / row["fixed_tokens_per_s"])
    assert all(each["gap"] < 1e-4 for each in row["parted"])
    (out / "table.md").read_text().index("of 5")
    assert throughput_report(values) == (out / "table.md").read_text()
    assert "is not overwritten" in failure("bench", "throughput", "random:tiny", *SHORT, "--out", out)


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--methods",), "nothing to measure; name --methods or --presets"),
        (("--slots",), "--slots has no value; give at least one"),
        (("--prompts", 0), "--prompts is 0; it must be 1 or more"),
        (("--reply-tokens", 9, 3), "--reply-tokens 9 3 must rise from 1 or more"),
        (("--prompt-tokens", 0, 3), "--prompt-tokens 0 3 must rise from 1 or more"),
        (("--contexts", 8, 0), "--contexts is 0; it must be 1 or more"),
        (("--seed", -1), "--seed is -1; it must be 0 or more"),
        (("--methods", "tova", "--verify", 4), "evicts pages that the check needs"),
        (("--text", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--text", __file__), "random:tiny has no tokenizer; leave --text out"),
    ),
)
def test_bench_throughput_refuses(failure, flags, message):
    assert message in failure("bench", "throughput", "random:tiny", *SHORT, *flags)
