"""Measurements of operations on pages in 8 bits."""

import dataclasses

from retro_jax.experiments.bench.kernel_cases import Case
from retro_jax.experiments.bench.kernel_report import kernel_report
from tests.experiments.bench.test_bench_kernels import H100, TINY


def test_pages_in_8_bits_are_measured_with_their_scales(json_command):
    dims = dataclasses.replace(H100, cache_dtype="int8")  # statistics stay as they are
    assert Case("update", 1, 32768, tokens=4).bytes(dims) == 8 * ((4 * 2 + 16) * 132 + 2 * 256)
    flags = ("--operations", "attention", "dense", "update", "--cases", "1x128@0.25", "--contexts", "1x64")
    flags = (*flags, "--windows", 2, "--statistics", "min_max", "--baselines", "jax", *TINY)
    values = json_command("bench", "kernels", *flags, "--cache-dtype", "float8_e4m3fn")
    ours, theirs = (
        [row for row in values["rows"] if bool(row["baseline"]) == other] for other in (False, True)
    )
    assert [row["operation"] for row in ours] == ["attention", "dense", "update"]
    # K, C, keys and values of a page, bytes of one
    assert (ours[0]["bytes"], theirs[0]["bytes"]) == (2 * 4 * 16 * 12, 2 * 4 * 16 * 32)
    assert "pages of 8 in float8_e4m3fn." in kernel_report(values)
