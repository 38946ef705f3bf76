"""The names that the library takes: a user's own folders stay his."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = ("models", "experiments", "tests")

PROGRAM = """
import sys
{path}
import models, experiments, tests
import retro_jax, retro_jax.models, retro_jax.experiments.io.tables
from retro_jax import load_model
assert [m.OWN for m in (models, experiments, tests)] == [True] * 3
assert load_model is retro_jax.models.load_model
found = {{}}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and name.split(".")[0] in ("retro_jax", "pallas_kernels", "models", "experiments", "tests"):
        import os
        assert found.setdefault(os.path.realpath(file), name) == name, (name, found[os.path.realpath(file)])
print(retro_jax.__file__)
"""


@pytest.fixture
def folder(tmp_path):
    for name in OWN:
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "__init__.py").write_text("OWN = True\n")
    return tmp_path / "project"


def run_in(folder, path):
    program = PROGRAM.format(path=f"sys.path.append({str(path)!r})" if path else "")
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize("path", [None, ROOT], ids=["installed", "checkout"])
def test_a_project_with_folders_of_the_same_names(folder, path):
    assert run_in(folder, path) == ROOT / "retro_jax" / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What a wheel holds, as the build backend lays it out."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    subprocess.run([sys.executable, "-m", "zipfile", "-e", built, str(folder / "site")], check=True)
    return folder / "site"


def test_a_wheel_takes_two_names(folder, wheel):
    """Without the environment's own copy in view."""
    assert {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"} == {"retro_jax", "pallas_kernels"}
    assert {p.parent.name for p in wheel.glob("*/py.typed")} == {"retro_jax", "pallas_kernels"}
    program = f"sys.path[1:] = [p for p in sys.path[1:] if p != {str(ROOT)!r}] + [{str(wheel)!r}]"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(path=program)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == wheel / "retro_jax" / "__init__.py"


COMMANDS = """
import contextlib, io, json, sys
sys.path[:] = [p for p in sys.path if p != {root!r}] + [{wheel!r}]
from retro_jax.experiments import cli
assert cli.__file__.startswith({wheel!r}), cli.__file__

def run(*words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            cli.main(list(words))
        except SystemExit as stop:
            assert not stop.code, (words, stop.code)
    return printed.getvalue()

helps = []
for name, entry in cli.COMMANDS.items():
    below = [[]] if isinstance(entry, cli.Entry) else [[], *([word] for word in entry.entries())]
    helps += [run(name, *more, "--help") for more in below]
assert all(helps), helps
text = "--token-ids ids.npy --max-new-tokens 2 --json".split()
assert json.loads(run("generate", "random:tiny", "--preset", "mean-key", "--budget-tokens", "64", *text))
run("run", "smollm2-recall", "--dry-run", "--json")
print(json.dumps(helps))
"""


def test_commands_work_from_a_wheel_alone(wheel, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(40)[None])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(root=str(ROOT), wheel=str(wheel))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout.splitlines()[-1])
    assert len(helps) > 20
    absent = [word for text in helps for word in ("experiments/texts", "docs/", "Makefile") if word in text]
    assert not absent, "a checkout's files, which a wheel has not"


@pytest.mark.parametrize("name", ["models", "experiments"])
def test_the_folders_are_no_packages_of_their_own(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"is imported as retro_jax.{name}, not as {name}" in done.stderr
