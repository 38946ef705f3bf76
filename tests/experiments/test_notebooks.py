"""The notebooks run in small form on a random model, and are committed with the outputs of the real one."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.experiments.analyses.window import by_query
from retro_jax.experiments.bench.transformers_export import export
from retro_jax.models import random_params
from retro_jax.models.presets import SIZES

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
TOKENIZER = ROOT / "tests" / "models" / "golden" / "llama3.1-sharded" / "tokenizer.json"
VOCABULARY = 384  # of that tokenizer
NAMES = ("quickstart", "inside_the_window")
LIMIT = 1_500_000  # bytes of a notebook


def cells(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


def code_cells(name):
    return [cell for cell in cells(name) if cell["cell_type"] == "code"]


def execute(name, **parameters):
    """Runs the code cells in order, with these values after the cell of parameters; returns the namespace."""
    namespace = {"__name__": "__main__"}
    for cell in code_cells(name):
        exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys()
            namespace |= parameters
    return namespace


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a random model of four layers that can read text."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(TOKENIZER, folder)
    config = dataclasses.replace(SIZES["tiny"], vocab_size=VOCABULARY)
    export(rj.Model(config, random_params(config, jax.random.key(0)), tokenizer=None), folder)
    return str(folder)


@pytest.fixture(autouse=True)
def without_a_display():
    """Figures are drawn by a backend that shows nothing, and closed afterwards."""
    plt.switch_backend("agg")
    yield
    plt.close("all")


def drawn():
    """The figures, drawn once more so that what they hold is checked."""
    figures = [plt.figure(number) for number in plt.get_fignums()]
    for figure in figures:
        figure.canvas.draw()
    return figures


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_quickstart(reader, capsys):
    seen = execute(
        "quickstart",
        MODEL=reader,
        PROMPT_TOKENS=64,
        NEW_TOKENS=8,
        SCORED_TOKENS=64,
        BUDGET_TOKENS=48,
        WINDOW=3,
        AVERAGED_BLOCKS=1,
    )
    summaries = {name: run.metrics.summary() for name, run in seen["written"].items()}
    assert set(summaries["full attention"]["exposure"]) == {None}
    assert summaries["Quest"]["exposure"] == [1.0]
    assert 1.0 < summaries["RetroAttention"]["exposure"][-1] <= 3.0
    assert summaries["RetroAttention"]["pages_loaded"] == 3
    assert (
        summaries["RetroAttention"]["kv_bytes"]
        == summaries["Quest"]["kv_bytes"]
        < summaries["full attention"]["kv_bytes"]
    )
    for values in seen["excess"].values():
        assert values.shape == (1, 64)
        assert values[0, 0] == 0.0  # comes from the prompt, which has full attention in every method
        assert np.abs(values).max() > 0.01
    assert np.abs(seen["excess"]["RetroAttention"] - seen["excess"]["Quest"]).max() > 1e-3

    (figure,) = drawn()
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for name, values in seen["excess"].items():
        np.testing.assert_allclose(curves[name], [values.mean()])
    assert re.search(r"full attention +\| +all \| +[\d.]+ \| +none \|", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_inside_the_window(reader):
    seen = execute(
        "inside_the_window",
        MODEL=reader,
        PROMPT_TOKENS=96,
        TOKENS=160,
        BUDGET_TOKENS=48,
        WINDOW=4,
        DENSE_LAYERS=1,
        DEEP_LAYER=3,
    )
    pages = seen["new_pages"][True]
    assert (pages[:, -1].sum(axis=-1) == 3).all()  # the budget
    assert not np.any(pages[:, :-1] & ~pages[:, -1:])  # past queries get what the newest loads
    assert by_query(pages).sum(axis=1).max() == 1  # and no query gets a page twice

    corrected, stale = (by_query(seen["outputs"][overwrite]) for overwrite in (True, False))
    means = corrected.mean(axis=0)  # [later steps, sparse layers]
    assert (np.diff(means[:, 0]) < 0).all()
    assert means[-1, 0] < 0.9 * means[0, 0]
    assert means[-1, -1] < means[0, -1]
    np.testing.assert_allclose(corrected[:, :, 0], stale[:, :, 0], atol=1e-5)
    assert means[-1, 1:].mean() < stale.mean(axis=0)[-1, 1:].mean()

    corrected, stale = (by_query(seen["keys"][overwrite]).mean(axis=0) for overwrite in (True, False))
    np.testing.assert_allclose(corrected[:, 0], 0, atol=1e-5)
    assert (corrected[-1, 1:] < corrected[0, 1:]).all()
    assert (corrected[-1, 1:] < stale[-1, 1:]).all()
    np.testing.assert_allclose(stale[-1], stale[0], atol=1e-6)

    figures = drawn()
    assert len(figures) == 5
    (picture,) = figures[0].axes[0].images
    np.testing.assert_array_equal(np.asarray(picture.get_array()) > 0, pages[:, -1, 0].T)


@pytest.mark.parametrize("name", NAMES)
def test_the_installation_cell_installs_only_what_is_missing(name, monkeypatch):
    (source,) = (
        "".join(cell["source"]) for cell in code_cells(name) if "find_spec" in "".join(cell["source"])
    )
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(source, {"REPOSITORY": ""})
    assert commands == []

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="set it to"):
        exec(source, {"REPOSITORY": ""})
    exec(source, {"REPOSITORY": "https://host/project"})
    assert commands[0][1:] == ["-m", "pip", "install", "--quiet", "retro-jax @ git+https://host/project"]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_one_run_of_its_cells_with_the_real_model(name):
    code = code_cells(name)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    (parameters,) = (
        "".join(cell["source"]) for cell in code if "parameters" in cell["metadata"].get("tags", ())
    )
    assert 'MODEL = "smollm2-135m"' in parameters

    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warnings, no errors
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    assert pictures == sum("plt.show()" in "".join(cell["source"]) for cell in code) > 0
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LIMIT
