"""The contracts on imports in pyproject.toml, which `make lint` checks, forbid what they are there for."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PLANTED = {
    "models and pallas_kernels import nothing else of ours": ("models/rope.py", "retro_jax.sizes"),
    "models and pallas_kernels do not import each other": ("models/rope.py", "pallas_kernels.layout"),
    "nothing else imports experiments": ("retro_jax/sizes.py", "retro_jax.experiments.machine.devices"),
    "rooms of experiments": ("experiments/tasks/base.py", "retro_jax.experiments.bench.device_time"),
    "no circles": ("experiments/machine/devices.py", "retro_jax.experiments.machine.memory"),
    "the kernels of one kind of chip know nothing of another's": (
        "pallas_kernels/attention/tpu/kernels.py",
        "pallas_kernels.attention.gpu.blocks",
    ),
    "of an operation only its api imports kernels": (
        "pallas_kernels/selection/reference.py",
        "pallas_kernels.update.gpu.kernels",
    ),
}
"""An import that breaks each contract: the file, and what it must not import."""


def test_each_contract_fails_on_a_planted_import(tmp_path):
    assert PLANTED.keys() == {contract["name"] for contract in CONTRACTS}
    for name in ("retro_jax", "pallas_kernels", "models", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__", "texts")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, module in PLANTED.values():
        with (tmp_path / file).open("a") as stream:
            stream.write(f"\nimport {module}\n")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    for name, (file, module) in PLANTED.items():
        told = re.search(rf"^{name}\n-+\n(.*?)(\n\n\n|\Z)", done.stdout, re.M | re.S)
        assert told, f"{name} was kept"
        assert Path(file).stem in told[1] and module.rpartition(".")[2] in told[1]
