import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import retro_jax.experiments.io.progress
from retro_jax.experiments.cli import main
from tests.experiments.drawn import check


@pytest.fixture
def ids_file(tmp_path):
    """Two random texts of 96 tokens for random:tiny (512 ids)."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(512, size=(2, 96)))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, each checked."""
    found = []

    def savefig(figure, *_, **__):
        figure.draw_without_rendering()
        check(figure)
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command line in this process; returns (exit status, stdout, stderr).

    However slow the machine is, stderr has no lines on compiling.
    """
    monkeypatch.setattr(retro_jax.experiments.io.progress, "LEAST_COMPILING", 1e9)

    def run(*arguments):
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def json_command(command):
    """Runs a command with --json; returns the object that is all of its stdout."""

    def run(*arguments):
        status, out, err = command(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def failure(command):
    """Runs a command that must be refused; returns its one line."""

    def run(*arguments):
        status, out, err = command(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("retro-jax: error: ")
        assert err.count("\n") == 1, f"more than one line: {err}"
        return err

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random model with a tokenizer and a chat template, as a folder."""
    source = Path(__file__).resolve().parent.parent / "models" / "golden" / "llama3.1-sharded"
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    return folder
