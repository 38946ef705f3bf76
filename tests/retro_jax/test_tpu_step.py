"""The whole decode step of Llama-3.1-8B's shape through the real TPU compiler for every chip."""

import dataclasses
import re

import jax
import pytest

from pallas_kernels.tpu import CHIPS
from retro_jax import DecodeConfig, init_state
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.compiler import compile_step
from retro_jax.models.presets import SIZES

pytestmark = [
    pytest.mark.skipif(
        not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test"
    ),
    pytest.mark.timeout(240),
]
MODEL = dataclasses.replace(SIZES["llama3.1-8b"], num_layers=2)
CONFIG = DecodeConfig(window=4, page_size=32, dense_layers=1)
KERNELS = {"dense_attention": 1, "retro_attention": 1, "select_pages": 1, "update_pages": 2}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("chip", CHIPS)
def test_it_runs_through_the_kernels_and_copies_no_cache(chip, devices):
    executable = compile_step(chip, devices, MODEL, CONFIG, capacity=32768)
    program = executable.as_text()
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert {name: sum(f"{name}/pallas_call" in call for call in calls) for name in KERNELS} == KERNELS

    state = jax.eval_shape(lambda: init_state(MODEL, CONFIG, 1, 32768))
    cache = sum(layer.pages.size * 2 for layer in state.layers) // devices
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache // len(state.layers) // 2

    # What tensor parallelism needs and no more: two sums a layer, the embedding's, logits' and metrics'.
    assert "all-gather" not in program
    sums = len(re.findall(r" all-reduce(?:-start)?\(", program))
    assert sums <= 2 * MODEL.num_layers + 3
    assert (sums > 0) == (devices > 1)
