import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from retro_jax import DecodeConfig
from retro_jax.experiments.bench.decode_command import BenchDecodeFlags
from retro_jax.experiments.compare import comparison
from retro_jax.experiments.machine import mesh
from retro_jax.experiments.machine.mesh import mesh_of_flags


def test_one_device_of_one_process_needs_no_mesh():
    assert mesh_of_flags(1, 1, distributed=False) is None
    assert dict(mesh_of_flags(2, 2, distributed=False).shape) == {"data": 2, "model": 2}


@pytest.mark.parametrize(
    ("data", "model", "processes", "said"),
    (
        (0, 1, 1, "--data-devices 0 and --model-devices 1 must be 1 or more"),
        (2, 3, 1, "ask for 6 devices, this process has 4; choose two numbers whose product is at most 4"),
        (1, 2, 2, "ask for 2 devices, the 2 processes have 4; choose two numbers whose product is 4"),
    ),
)
def test_devices_that_are_not_there_or_left_over(monkeypatch, data, model, processes, said):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(ValueError, match=said):
        mesh_of_flags(data, model, distributed=False)


def test_processes_are_joined_once_and_missing_ones_told(monkeypatch):
    calls = []

    def initialize():
        calls.append(True)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(mesh.jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"no other processes: coordinator.* srun or mpirun"):
        mesh_of_flags(1, 1, distributed=True)
    monkeypatch.setattr(mesh.jax.distributed, "is_initialized", lambda: True)
    assert mesh_of_flags(1, 1, distributed=True) is None
    assert len(calls) == 1


def test_what_libraries_print_leaves_stdout_to_results(monkeypatch, capfd):
    monkeypatch.setattr(mesh.jax.distributed, "initialize", lambda: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    before = os.dup(1)
    try:
        mesh.join_processes()
        os.write(1, b"[Gloo] connected")
        print("{}", flush=True)
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert capfd.readouterr() == ("{}\n", "[Gloo] connected")


def test_processes_but_the_first_print_no_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    BenchDecodeFlags(model="m").mesh()
    print("of the first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    BenchDecodeFlags(model="m").mesh()
    print("of another")
    assert capsys.readouterr().out == "of the first\n"


@pytest.mark.parametrize("process", (0, 1))
def test_processes_but_the_first_write_no_comparison(monkeypatch, tmp_path, process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    scored = SimpleNamespace(of=lambda rows: rows)
    monkeypatch.setattr(comparison, "score", lambda *_, **__: scored)
    texts = SimpleNamespace(names=["a"], ids=np.zeros((1, 4), int), prompt_tokens=2)
    saved = []
    folder = SimpleNamespace(has=lambda name: False, save=lambda *run: saved.append(run), runs=lambda: saved)
    found = comparison.compare(
        None, texts, [DecodeConfig("full", sink_pages=0)], folder, lambda title: nullcontext()
    )
    assert len(saved) == len(found) == 1 - process


@pytest.mark.parametrize("flags", (("--chat",), ("--prompts", "p.jsonl", "--out", "o.jsonl")))
def test_what_several_processes_cannot_do_is_refused(failure, flags):
    line = failure("generate", "random:tiny", "--distributed", *flags)
    assert "--distributed can be used with --prompt, --prompt-file and --token-ids only" in line
