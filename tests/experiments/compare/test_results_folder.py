import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from retro_jax import DecodeConfig, Metrics
from retro_jax.experiments.compare.folder import ComparisonFolder
from retro_jax.experiments.io.files import finite, write_json
from retro_jax.experiments.io.settings import run_name

IDENTITY = {"model": "m", "tokens": 8, "config": {"budget": 0.15, "page_size": 16}}
CONFIG = DecodeConfig(method="retro", window=2)


def a_score():
    rng = np.random.default_rng(0)
    attended = np.ones((3, 2, 2)) * [4.0, 1.0]
    metrics = Metrics(pages_attended=attended, pages_loaded=np.ones((3, 2)), kv_bytes=np.full((3, 2), 7.0))
    return SimpleNamespace(nll=rng.normal(size=(2, 4)), metrics=metrics)


def test_a_run_comes_back(tmp_path):
    folder = ComparisonFolder(tmp_path / "new", IDENTITY)
    assert not folder.has("retro-w2")
    folder.save(CONFIG, a_score(), 1.5, {"commit": "abc"})
    run = ComparisonFolder(tmp_path / "new", IDENTITY).load("retro-w2")
    assert run.config == CONFIG
    np.testing.assert_array_equal(run.nll, a_score().nll)
    assert run.exposure.tolist() == [1.0, 1.25]
    assert (run.pages_loaded, run.kv_bytes, run.seconds) == (1.0, 7.0, 1.5)
    assert run.provenance == {"commit": "abc"}
    assert not list((tmp_path / "new").rglob("*.partial*"))


def test_nothing_is_overwritten(tmp_path):
    folder = ComparisonFolder(tmp_path / "new", IDENTITY)
    folder.save(CONFIG, a_score(), 1.5, {})
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        folder.save(CONFIG, a_score(), 1.5, {})


def test_another_comparison_is_refused(tmp_path):
    ComparisonFolder(tmp_path, IDENTITY).save(CONFIG, a_score(), 1.5, {})
    other = IDENTITY | {"config": {"budget": 0.15, "page_size": 8}}
    with pytest.raises(ValueError, match=r"holds another comparison \(config.page_size 16, not 8\); choose"):
        ComparisonFolder(tmp_path, other)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not a comparison's folder"):
        ComparisonFolder(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="is not a comparison's folder"):
        ComparisonFolder(tmp_path / "thesis.tex", IDENTITY)


def test_nothing_is_written_before_a_run_is_finished(tmp_path):
    ComparisonFolder(tmp_path / "new", IDENTITY)
    assert not (tmp_path / "new").exists()


def test_order_of_runs(tmp_path):
    folder = ComparisonFolder(tmp_path / "new", IDENTITY)
    configs = [
        DecodeConfig(method="retro", window=16, sink_pages=0),
        DecodeConfig(method="retro", window=2, sink_pages=1),
        DecodeConfig(method="retro", window=2, sink_pages=0, overwrite=False),
        DecodeConfig(method="retro", window=2, sink_pages=0),
        DecodeConfig(method="quest", sink_pages=0),
        DecodeConfig(method="full", sink_pages=0),
    ]
    for config in configs:
        folder.save(config, a_score(), 0.0, {})
    assert [run.name for run in folder.runs()] == [
        "full",
        "quest-sinks0",
        "retro-w2-sinks0",
        "retro-w16-sinks0",
        "retro-w2-sinks0-no_overwrite",
        "retro-w2",
    ]
    assert len({run_name(config) for config in configs}) == len(configs)


def test_numbers_that_are_not_finite_become_null():
    values = {"a": [float("nan"), 1.0], "b": {"c": float("inf"), "d": "text", "e": None}}
    assert json.dumps(finite(values)) == '{"a": [null, 1.0], "b": {"c": null, "d": "text", "e": null}}'


@pytest.mark.parametrize("damage", [b"", b'{"model"', b"[]"])
def test_a_damaged_comparison_is_named(tmp_path, damage):
    ComparisonFolder(tmp_path, IDENTITY).save(CONFIG, a_score(), 1.5, {})
    (tmp_path / "comparison.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"comparison\.json is damaged \(.*; restore it, or start anew"):
        ComparisonFolder(tmp_path, IDENTITY)


@pytest.mark.parametrize("kept", [0, 100, 700, -30, "no zip", "no arrays"])
def test_a_damaged_run_is_named(tmp_path, kept):
    folder = ComparisonFolder(tmp_path, IDENTITY)
    folder.save(CONFIG, a_score(), 1.5, {})
    file = tmp_path / "runs" / "retro-w2.npz"
    if kept == "no arrays":
        np.savez(file, nll=np.zeros(3))
    else:
        file.write_bytes(b"something else" if kept == "no zip" else file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"retro-w2\.npz is damaged.*move it away, and the same command"):
        folder.runs()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, step):
    write_json(tmp_path / "results.json", {"a": 1})
    folder = ComparisonFolder(tmp_path / "new", IDENTITY)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(
        OSError, match=r"could not write .*results\.json \(No space left on device\); nothing of it"
    ):
        write_json(tmp_path / "results.json", {"a": 2})
    with pytest.raises(OSError, match=r"could not write .*comparison\.json"):
        folder.save(CONFIG, a_score(), 1.5, {})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["results.json"]
    monkeypatch.undo()
    (tmp_path / "new" / "comparison.json.partial1").write_text("{")  # of a kill
    ComparisonFolder(tmp_path / "new", IDENTITY).save(CONFIG, a_score(), 1.5, {})


def test_a_folder_that_cannot_be_written_is_refused_at_the_door(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be written to; choose another --out"):
        ComparisonFolder(tmp_path / "new", IDENTITY)
