"""What is checked by hand on a device tells each result when it is there, and keeps it."""

import importlib
import io
import json
import sys
import time
from types import SimpleNamespace

import pytest

import pallas_kernels


def test_results_are_told_before_the_last_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(pallas_kernels, "kernels_of_device", lambda: "mosaic_gpu")
    on_device = importlib.import_module("tests.pallas_kernels.on_device")
    out, told = tmp_path / "report.json", io.StringIO()

    def check(configuration, cases):
        """The first waits for the second to be told."""
        wait_until = time.monotonic() + 5 * (configuration.name == "first")
        while time.monotonic() < wait_until and "ok" not in told.getvalue():
            time.sleep(0.01)
        kept = [row["name"] for row in json.loads(out.read_text())["rows"]] if out.exists() else []
        same = configuration.name == "second" or kept == ["second"]
        return {"name": configuration.name, "cases": cases, "error": 0.0, "exact": same, "repeated": True}

    names = [SimpleNamespace(name=name) for name in ("first", "second")]
    monkeypatch.setattr(on_device, "configurations", lambda: names)
    monkeypatch.setattr(on_device, "check", check)
    monkeypatch.setattr(sys, "argv", ["on_device", "--cases", "2", "--out", str(out)])
    monkeypatch.setattr(sys, "stdout", told)
    with pytest.raises(SystemExit) as stop:
        on_device.main()
    assert not stop.value.code
    assert told.getvalue().splitlines() == [
        "ok   0.0e+00 2 second",
        "ok   0.0e+00 2 first",
        "2 passed, 0 failed, 4 cases",
    ]
