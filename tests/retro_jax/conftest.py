import jax
import pytest

OPTIMIZED = ("test_one_compilation", "test_smollm2", "test_tpu_step")
"""Modules that look at what was compiled, or run it for long."""


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """The other tests run a program for moments: to optimize its machine code takes longer than it saves."""
    quick = request.module.__name__.rpartition(".")[2] not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
