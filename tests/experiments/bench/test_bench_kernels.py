import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from retro_jax.experiments.bench import bandwidth, kernel_cases
from retro_jax.experiments.bench import device_time as timing_of_device
from retro_jax.experiments.bench import kernels as bench_kernels
from retro_jax.experiments.bench.bandwidth import read_bandwidth
from retro_jax.experiments.bench.device_time import (
    Event,
    Executed,
    busy_ns,
    device_events,
    device_time,
    executed,
    split_calls,
    summarize,
)
from retro_jax.experiments.bench.kernel_baselines import BASELINES, Baseline
from retro_jax.experiments.bench.kernel_cases import (
    Case,
    Dimensions,
    parse_case,
    prepare,
    random_page_ids,
    sets_for,
)
from retro_jax.experiments.bench.kernel_report import kernel_report
from retro_jax.experiments.bench.kernels import Timer, over_flashinfer
from retro_jax.experiments.io.tables import rounded

DIMS = Dimensions(kv_heads=2, group=2, head_dim=8, page_size=8, dtype="float32")
H100 = Dimensions(kv_heads=8, group=4, head_dim=128, page_size=16, dtype="bfloat16")
TINY = (
    "--kv-heads", 2, "--group", 2, "--head-dim", 8, "--page-size", 8, "--dtype", "float32",
    "--calls", 2, "--warm-up", 1, "--ceiling-bytes", 65536,
)  # fmt: skip
ONE = ("--operations", "select", "--select-pages", 8, "--scores", "bounds", "--group-reduces", "mean", *TINY)


def cells(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# Device time


def test_overlapping_events_count_once():
    assert busy_ns([Event("a", 0, 10), Event("b", 5, 10), Event("c", 20, 5), Event("d", 21, 1)]) == 20
    assert busy_ns([Event("late", 30, 5), Event("early", 0, 5)]) == 10
    assert busy_ns([]) == 0


def test_events_are_divided_into_equal_calls():
    events = [Event(name, start, 2) for start, name in [(0, "a"), (3, "b"), (100, "b"), (103, "a")]]
    groups = split_calls(events[::-1], 2)
    assert [[event.start_ns for event in group] for group in groups] == [[0, 3], [100, 103]]


@pytest.mark.parametrize(("names", "calls"), [("aba", 2), ("aaa", 2), ("abaa", 2), ("a", 2), ("", 1)])
def test_calls_that_differ_are_not_divided(names, calls):
    assert split_calls([Event(name, 10 * at, 1) for at, name in enumerate(names)], calls) is None


def test_timing_of_calls():
    events = []
    for at, length in ((0, 1000), (10_000, 3000), (20_000, 2000)):
        # The second kernel starts 200 before the first ends; the third comes after a gap of 500.
        events += [
            Event("k", at, length),
            Event("m", at + length - 200, 700),
            Event("k", at + length + 1000, 100),
        ]
    timing = summarize(events, [5e-6, 9e-6, 6e-6])
    assert timing.how == "device"
    assert timing.busy_us == pytest.approx(2.6)  # 2000 - 200 + 700 + 100
    assert timing.span_us == pytest.approx(3.1)
    assert timing.busy_us_10_90 == pytest.approx((1.8, 3.4))
    assert timing.wall_us == pytest.approx(6.0)
    assert [(kernel.name, kernel.us) for kernel in timing.kernels] == [
        ("k", pytest.approx(2.0)),
        ("m", pytest.approx(0.7)),
        ("k", pytest.approx(0.1)),
    ]


def test_calls_that_differ_give_the_mean():
    timing = summarize([Event("a", 0, 1000), Event("a", 5000, 1000), Event("b", 5500, 2500)], [1e-3, 1e-3])
    assert (timing.how, timing.span_us) == ("device mean", None)
    assert timing.busy_us == pytest.approx(2.0)  # 1000 and 5000..8000, over two calls
    assert {kernel.name: kernel.us for kernel in timing.kernels} == pytest.approx({"a": 1.0, "b": 1.25})


def test_without_a_trace_the_time_is_wall_time():
    timing = summarize([], [1e-6, 5e-6, 2e-6])
    assert (timing.how, timing.busy_us, timing.kernels) == ("wall", pytest.approx(2.0), ())


def plane(name, lines):
    events = "events { metadata_id: 1 offset_ps: 2000000 duration_ps: 3000000 }"
    body = "".join(f'lines {{ name: "{line}" timestamp_ns: 1000 {events} }} ' for line in lines)
    return f'planes {{ name: "{name}" event_metadata {{ key: 1 value {{ id: 1 name: "kernel" }} }} {body} }} '


@pytest.mark.parametrize(
    ("name", "lines", "found"),
    [
        ("/device:GPU:0", ["Stream #7(Compute)", "Stream #9(MemcpyD2D)", "XLA Modules", "CUPTI overhead"], 2),
        ("/device:TPU:0", ["XLA Ops", "XLA Modules", "Steps"], 1),
        ("/host:CPU", ["Stream #7(Compute)"], 0),
    ],
)
def test_events_of_a_trace(name, lines, found):
    profile = ProfileData.from_text_proto(plane(name, lines))
    assert device_events(profile) == [Event("kernel", 3000.0, 3000.0)] * found


def test_of_several_devices_the_first_is_told(monkeypatch):
    planes = [plane(f"/device:GPU:{device}", ["Stream #7"] * (device + 1)) for device in (10, 2, 1)]
    assert (
        device_events(ProfileData.from_text_proto("".join(planes))) == [Event("kernel", 3000.0, 3000.0)] * 2
    )


def test_what_steps_execute_is_a_mean_over_them(monkeypatch):
    assert executed(lambda _: None, calls=1, parts=4) is None  # there is no trace of a CPU
    found = [Event("product", 0, 3e6), Event("copy", 2e6, 2e6), Event("product", 9e6, 4e6)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing_of_device, "_traced", lambda *_: (found, []))
    told = executed(lambda _: None, calls=1, parts=2)
    assert told == Executed(4.0, 1.5, {"product": (1.0, 3500.0), "copy": (0.5, 1000.0)})
    assert list(told.kernels) == ["product", "copy"]


def test_calls_are_numbered_from_the_first_of_warm_up():
    seen, waited = [], []
    timing = device_time(lambda index: seen.append(index) or index, calls=3, warm_up=2, wait=waited.append)
    assert seen == waited == [0, 1, 2, 3, 4]
    assert (timing.calls, timing.how) == (3, "wall")
    with pytest.raises(ValueError, match="0 calls after 1 of warm-up"):
        device_time(lambda index: None, calls=0, warm_up=1)


# Cases


def test_bytes_that_must_move():
    # 8 KV heads; a key is 256 bytes, a page of 16 keys and values 8192.
    assert Case("attention", 1, 32768, 0.125, window=16).bytes(H100) == 8 * 256 * 8192
    assert Case("attention", 8, 32768, 0.125).bytes(H100) == 8 * 8 * 256 * 8192
    assert Case("dense", 8, 32768).bytes(H100) == 8 * 8 * 2048 * 8192
    assert Case("select", 1, 8192 * 16, 0.15, score="bounds").bytes(H100) == 8 * 8192 * 2 * 256
    by = {"score": "mean_key", "statistics": "mean_key"}
    assert Case("select", 1, 8192 * 16, 0.15, **by).bytes(H100) == 8 * 8192 * 256
    by["statistics"] = "mean_key_int8"
    assert Case("select", 1, 8192 * 16, 0.15, **by).bytes(H100) == 8 * 8192 * 132
    # 4 keys and values, the 16 keys of the page, its 2 vectors.
    assert Case("update", 1, 32768, tokens=4).bytes(H100) == 8 * 256 * (4 * 2 + 16 + 2)
    assert Case("update", 1, 32768, tokens=40).bytes(H100) == 8 * 256 * (40 * 2 + 3 * (16 + 2))
    eight = Case("update", 1, 32768, tokens=4, statistics="mean_key_int8")
    assert eight.bytes(H100) == 8 * (256 * (4 * 2 + 16) + 132)


def test_footprint_is_the_memory_of_one_set(monkeypatch):
    made = []

    def counted(key, shape, dtype):
        made.append(np.prod(shape) * 4)
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(kernel_cases, "normal", counted)
    update = Case("update", 2, 64, tokens=4)
    prepare(update, DIMS, "xla", 1, 2, 0)
    assert sum(made[:2]) == update.footprint(DIMS)  # pages and statistics
    eight = Case("update", 2, 64, tokens=4, statistics="mean_key_int8")
    assert eight.footprint(DIMS) == made[0] + 2 * 2 * 8 * (8 + 4)
    assert Case("attention", 2, 64, 0.25).footprint(DIMS) == made[0]


def test_sets_exceed_the_cache_within_memory():
    assert sets_for(16 << 20, 128 << 20, 50, None) == 8
    assert sets_for(16 << 20, 128 << 20, 5, None) == 5
    assert sets_for(16 << 20, 128 << 20, 50, 4 * 3 * (128 << 20)) == 3
    assert sets_for(1 << 30, 1 << 30, 50, None) == 2


@pytest.mark.parametrize(
    ("text", "shared", "message"),
    [
        ("1x32768", True, "'1x32768' is no case; write BATCHxCONTEXT@SHARE, as 1x32768@0.125"),
        ("1x32768@0.5", False, "write BATCHxCONTEXT, as 1x32768"),
        ("0x32@0.5", True, "'0x32@0.5' is out of range"),
        ("1x32@1.5", True, "the share within 0..1"),
        ("1x32@0", True, "the share within 0..1"),
    ],
)
def test_case_that_cannot_be_read(text, shared, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse_case(text, shared)


def test_case():
    assert parse_case("8x32768@0.125", shared=True) == (8, 32768, 0.125)
    assert parse_case("8x32768", shared=False) == (8, 32768, 1.0)


def test_random_pages_are_distinct_and_hold_the_newest():
    ids = random_page_ids(np.random.default_rng(0), (2, 3), pages=20, count=6)
    assert ids.shape == (2, 3, 6)
    assert all(len(set(row)) == 6 and 19 in row and max(row) < 20 for row in ids.reshape(-1, 6))
    assert len({tuple(row) for row in ids.reshape(-1, 6)}) == 6  # every KV head has its own


def test_attention_sees_some_pages_from_older_slots_in_every_call():
    case = Case("attention", 2, 128, 0.5, window=4)
    call = prepare(case, DIMS, "xla", 2, 6, 0)
    results = [jax.device_get(call(index)) for index in range(6)]
    o, lse, last_loaded = results[0]
    assert o.shape == (2, 4, 4, 8)
    assert np.isfinite(lse).all()
    assert ((last_loaded == 127).sum(axis=-1) == 8).all()  # half of the 16 pages
    np.testing.assert_array_equal(o, results[2][0])  # the same set, with nothing loaded by the calls before
    assert not np.array_equal(o, results[1][0])


def test_updates_write_elsewhere_in_every_call():
    case = Case("update", 1, 256, tokens=4)
    call = prepare(case, DIMS, "xla", 1, 4, 0)
    pages = [np.array(call(index)[0]) for index in range(4)]  # copies: the next call writes in place
    changed = [
        set(np.flatnonzero((before != after).any(axis=(0, 1, 3, 4, 5))).tolist())
        for before, after in itertools.pairwise(pages)
    ]
    assert [len(group) for group in changed] == [1, 1, 1]
    assert len(set.union(*changed)) == 3


# The command


def test_bench_kernels(json_command, command, tmp_path):
    out = tmp_path / "more" / "kernels"
    flags = (
        *TINY, "--cases", "2x128@0.25", "--contexts", "1x64", "--windows", 1, 2, "--select-pages", 16,
        "--scores", "mean_key", "--statistics", "min_max", "mean_key_int8", "--baselines", "jax",
        "--out", out,
    )  # fmt: skip
    values = json_command("bench", "kernels", *flags)
    assert values == json.loads((out / "results.json").read_text())
    rows = values["rows"]
    assert [(row["operation"], row["case"], row["window"], row["implementation"]) for row in rows] == [
        ("attention", "2x128@0.25", 1, "xla"),
        ("attention", "2x128@0.25", 2, "xla"),
        ("dense", "1x64", None, "xla"),
        ("select", "1x16 pages@0.15, mean_key of mean_key_int8, mean", None, "xla"),
        ("select", "1x16 pages@0.15, mean_key of mean_key_int8, mass", None, "xla"),
        ("update", "1x64, 4 tokens, min_max", None, "xla"),
        ("update", "1x64, 4 tokens, mean_key_int8", None, "xla"),
        ("attention", "2x128@0.25", None, "jax.nn (xla)"),
        ("dense", "1x64", None, "jax.nn (xla)"),
    ]
    for row in rows:
        assert row["timing"]["how"] == "wall"
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["timing"]["busy_us"] / 1e3)
        assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / values["ceiling_gb_per_s"])
        assert row["ceiling_us"] == pytest.approx(row["share_of_ceiling"] * row["timing"]["busy_us"])
    assert rows[0]["bytes"] == 2 * 2 * 4 * 2 * 8 * 8 * 4  # B, K, C, keys and values, S, D, float32
    assert values["ceiling_gb_per_s"] == max(values["ceilings_gb_per_s"].values()) > 0
    assert values["provenance"]["versions"]["jax"]
    assert {item["what"] for item in values["skipped"]} == {
        "attention 2x128@0.25: jax.nn (cudnn)",
        "dense 1x64: jax.nn (cudnn)",
    }
    report = (out / "table.md").read_text()
    assert "*wall*: there is no device trace" in report
    table = cells(report)
    assert table[0][:5] == ["operation", "case", "window", "implementation", "us"]
    assert [line[3] for line in table[2:5]] == ["xla", "xla", "jax.nn (xla)"]  # a case's rows together
    assert (out / "roofline.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_table_is_printed_and_what_is_missing_is_said(command, monkeypatch):
    monkeypatch.setattr("retro_jax.experiments.bench.kernel_baselines.find_spec", lambda name: None)
    flags = ("--operations", "dense", "--contexts", "1x64", "--implementations", "xla", "mosaic_tpu", *TINY)
    status, out, err = command("bench", "kernels", *flags)
    assert status == 0
    assert [line[2] for line in cells(out)] == ["implementation", "-------------:", "xla"]
    assert "dense 1x64: xla: " in err  # at once, before the table
    assert "skipped FlashInfer: flashinfer is not installed" in err
    assert "skipped torch SDPA: torch is not installed" in err
    assert "skipped dense 1x64: mosaic_tpu: NotImplementedError" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cases", "1x32768"), "'1x32768' is no case; write BATCHxCONTEXT@SHARE"),
        (("--contexts", "1x64@1"), "'1x64@1' is no case; write BATCHxCONTEXT, as 1x32768"),
        (("--implementations", "triton"), "--implementations 'triton' is unknown; use xla, mosaic_gpu"),
        (("--scores", "best"), "--scores 'best' is unknown; use bounds, mean_key"),
        (("--statistics", "median"), "--statistics 'median' is unknown; use min_max, mean_key"),
        (("--group-reduces", "sum"), "--group-reduces 'sum' is unknown; use mean, max, mass"),
        (("--operations", "select", "--statistics", "min_max", "--scores", "mean_key"), "nothing to measure"),
        (("--calls", 0), "--calls is 0; it must be 1 or more"),
        (("--windows", 0), "--windows 0 is not within 1..32768"),
        (("--select-share", 0), "--select-share is 0.0; it must be above 0 and at most 1"),
        (("--contexts", "1x16"), "do not fit into a context of 16 tokens; choose larger --contexts"),
        (("--operations", "dense", "--contexts"), "there is nothing to measure"),
    ],
)
def test_bench_kernels_refuses(failure, flags, message):
    assert message in failure("bench", "kernels", *flags)


def test_an_existing_folder_is_not_overwritten(failure, tmp_path):
    line = failure("bench", "kernels", *ONE, "--out", tmp_path)
    assert f"{tmp_path} exists and is not overwritten; choose another --out" in line


def test_nothing_measured_is_an_error(command):
    status, out, err = command("bench", "kernels", *ONE, "--implementations", "mosaic_tpu")
    assert (status, out) == (2, "")
    assert "nothing could be measured; the reasons are above" in err


def test_a_failure_keeps_the_other_times(monkeypatch, capsys):
    case = Case("dense", 1, 64)

    def broken(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(bench_kernels, "prepare", broken)
    timer = Timer(DIMS, 2, 1, 0, ceiling=1.0)
    timer.ours(case, "xla")
    assert timer.skipped == [{"what": "dense 1x64: xla", "why": "RuntimeError: first line"}]
    assert capsys.readouterr().err == "skipped dense 1x64: xla: RuntimeError: first line\n"
    Timer(DIMS, 2, 1, 0, ceiling=1.0, traceback=True).ours(case, "xla")
    assert "in broken" in capsys.readouterr().err


def test_the_fastest_variant_counts(monkeypatch):
    def time(self, variant, *_):
        if variant == "broken":
            raise RuntimeError("no")
        return summarize([Event("k", 0, {"slow": 9000, "fast": 2000}[variant])], [1e-3]), 3.0

    monkeypatch.setattr(Baseline, "time", time)
    library = Baseline("FlashInfer", "p", ("slow", "broken", "fast"), paged=True, torch=False, prepare=None)
    timer = Timer(DIMS, 1, 1, 0, ceiling=2.0)
    case = Case("dense", 1, 64)  # 8 pages of 2 KV heads: 16 kB
    timer.baseline(case, library)
    timer.ours(case, "xla")
    row, ours = over_flashinfer(timer.rows)
    assert (row.implementation, row.variants) == ("FlashInfer (fast)", {"slow": 9.0, "fast": 2.0})
    assert row.bytes == 8192
    assert (row.gb_per_s, row.share_of_ceiling, row.ceiling_us) == pytest.approx((4.096, 2.048, 4.096))
    assert (row.over_flashinfer, row.events_us) == (1.0, 3.0)
    assert ours.over_flashinfer == pytest.approx(ours.timing.busy_us / 2.0)
    assert timer.skipped == [{"what": "dense 1x64: FlashInfer (broken)", "why": "RuntimeError: no"}]


def test_read_bandwidth_counts_the_whole_array(monkeypatch):
    def time(call, calls, warm_up):
        call(0)
        return summarize([Event("sum", 0, 1000)] * calls, [1e-3] * calls)

    monkeypatch.setattr(bandwidth, "device_time", time)
    assert read_bandwidth(1 << 20, calls=2) == pytest.approx(dict.fromkeys(read_bandwidth(1 << 20), 1048.576))


def test_missing_baselines_say_why(monkeypatch):
    assert BASELINES["jax"].missing() is None
    monkeypatch.setattr(
        "retro_jax.experiments.bench.kernel_baselines.find_spec", lambda name: name == "torch" or None
    )
    assert BASELINES["flashinfer"].missing() == "flashinfer is not installed"
    assert BASELINES["torch"].missing() == "it needs an NVIDIA GPU, JAX runs on 'cpu'"


def results(windows=(1, 4), events=None):
    def row(implementation, window, baseline=None):
        timing = {"busy_us": 12.345, "span_us": None, "how": "device"}
        return {
            "operation": "attention", "case": "1x8@1", "window": window, "implementation": implementation,
            "baseline": baseline, "bytes": 16_000_000, "timing": timing, "gb_per_s": 1296.0,
            "share_of_ceiling": 0.405, "ceiling_us": 5.0, "events_us": events, "over_flashinfer": None,
        }  # fmt: skip

    return {
        "rows": [*(row(name, w) for w in windows for name in ("mosaic_gpu", "xla")), row("F (x)", None, "F")],
        "dimensions": {"dtype": "d", "kv_heads": 8, "group": 4, "head_dim": 128, "page_size": 16},
        "ceiling_gb_per_s": 3200.0,
        "ceilings_gb_per_s": {"sum": 3200.0},
        "calls": 50,
        "skipped": [],
        "provenance": {"device": "gpu: G"},
    }


def test_report_leaves_empty_columns_out():
    head, _, *body = cells(kernel_report(results()))
    assert head == [
        "operation", "case", "window", "implementation", "us", "by", "GB/s", "% of ceiling", "ceiling us",
    ]  # fmt: skip
    assert body[0] == ["attention", "1x8@1", "1", "mosaic_gpu", "12.3", "device", "1296", "40.5", "5.00"]
    assert "events us" in cells(kernel_report(results(events=3.0)))[0]
    assert [rounded(value) for value in (None, 0.123, 12.34, 1234.5)] == ["", "0.12", "12.3", "1234"]
