"""SIGKILL and SIGTERM at random points, in processes of their own."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from retro_jax.experiments.runs.run import TERMINATED
from tests.experiments.runs import stand_in

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.experiments.runs.stand_in"])
LINES = 24 * 5  # examples, and full, Quest and three windows


def start(out):
    process = CONTEXT.Process(target=stand_in.run, args=(out,))
    process.start()
    return process


def wait_for(file, size, process):
    deadline = time.monotonic() + 60
    while (file.stat().st_size if file.exists() else 0) <= size and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result file of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(out)
    process.join(60)
    assert process.exitcode == 0
    contents = (out / "results-0.jsonl").read_bytes()
    assert contents.count(b"\n") == LINES
    return contents


def test_killed_ten_times(whole, tmp_path):
    file, rng = tmp_path / "run" / "results-0.jsonl", random.Random(0)
    kills, torn = 0, 0
    for _ in range(10):
        before = file.stat().st_size if file.exists() else 0
        process = start(tmp_path / "run")
        wait_for(file, before, process)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        data = file.read_bytes()
        assert whole.startswith(data)
        if len(data) > before + 20 and rng.random() < 0.5:  # a kill within the write
            torn += 1
            os.truncate(file, len(data) - rng.randrange(1, 20))
    assert kills == 10 and torn > 0
    assert len(file.read_bytes()) < len(whole)
    process = start(tmp_path / "run")
    process.join(60)
    assert process.exitcode == 0
    assert file.read_bytes() == whole
    starts = (tmp_path / "run" / "provenance-0.jsonl").read_text().splitlines()
    assert len(starts) == 11 and json.loads(starts[0])["versions"]["jax"]
    assert json.loads(starts[0])["replies"] == LINES // 5


def test_sigterm_ends_after_the_batch(whole, tmp_path):
    file = tmp_path / "run" / "results-0.jsonl"
    process = start(tmp_path / "run")
    wait_for(file, 0, process)
    process.terminate()
    process.join(60)
    assert process.exitcode == TERMINATED == 143
    data = file.read_bytes()
    assert 0 < len(data) < len(whole) and data.endswith(b"\n") and whole.startswith(data)
