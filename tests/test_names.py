"""The names that the library takes: a user's own folders stay his."""

import subprocess
import sys
from pathlib import Path

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


def test_a_wheel_takes_two_names(folder, tmp_path):
    """As the build backend lays it out, without the environment's own copy in view."""
    from hatchling.builders.wheel import WheelBuilder

    site = tmp_path / "site"
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, str(site)], check=True)
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {"retro_jax", "pallas_kernels"}
    program = f"sys.path[1:] = [p for p in sys.path[1:] if p != {str(ROOT)!r}] + [{str(site)!r}]"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(path=program)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "retro_jax" / "__init__.py"


@pytest.mark.parametrize("name", ["models", "experiments"])
def test_the_folders_are_no_packages_of_their_own(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"is imported as retro_jax.{name}, not as {name}" in done.stderr
