"""Named runs: one file for each table of the paper and model, RULER, and runs of SmolLM2 for a CPU.

A file has `CONFIGS`, names to `RunConfig`s; add it to the list below. Every field is a flag of
`retro-jax run NAME`, so a variant needs no new name.
"""

from collections.abc import Mapping

from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.configs import (
    experts,
    longbench_llama3_1_8b,
    longgenbench_llama3_1_8b,
    longgenbench_qwen2_5_14b,
    longgenbench_qwen2_5_32b,
    pg19_llama3_1_8b,
    reasoning_deepseek_r1_llama_8b,
    ruler,
    smollm2,
)

_FILES = (
    smollm2,
    longgenbench_llama3_1_8b,
    longgenbench_qwen2_5_14b,
    longgenbench_qwen2_5_32b,
    longbench_llama3_1_8b,
    reasoning_deepseek_r1_llama_8b,
    pg19_llama3_1_8b,
    ruler,
    experts,
)

CONFIGS: Mapping[str, RunConfig] = {name: config for file in _FILES for name, config in file.CONFIGS.items()}

__all__ = ["CONFIGS"]
