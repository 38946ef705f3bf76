"""The whole decode step of Llama-3.1-8B's shape through the real TPU compiler for every chip."""

import dataclasses
import re

import jax
import pytest

from pallas_kernels.tpu import CHIPS
from retro_jax import DecodeConfig, init_state, preset
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.compiler import compile_step
from retro_jax.models.presets import SIZES

pytestmark = [
    pytest.mark.skipif(
        not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test"
    ),
    pytest.mark.timeout(240),
]
WIDE = dataclasses.replace(SIZES["llama3.1-8b"], num_layers=2)
NARROW = dataclasses.replace(WIDE, width=512, hidden_width=512, vocab_size=1024)
CONFIG = DecodeConfig(window=4, page_size=32, dense_layers=1)
KERNELS = {"dense_attention": 1, "retro_attention": 1, "select_pages": 1, "update_pages": 2}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("chip", CHIPS)
def test_it_runs_through_the_kernels_and_copies_no_cache(chip, devices):
    model = WIDE if chip == "v5e" else NARROW  # of the weights one chip's compiler says enough, slowly
    executable = compile_step(chip, devices, model, CONFIG, capacity=32768)
    program = executable.as_text()
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert {name: sum(f"{name}/pallas_call" in call for call in calls) for name in KERNELS} == KERNELS

    state = jax.eval_shape(lambda: init_state(model, CONFIG, 1, 32768))
    cache = sum(layer.pages.size * 2 for layer in state.layers) // devices
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache // len(state.layers) // 2

    # What tensor parallelism needs and no more: two sums a layer, the embedding's, logits' and metrics'.
    assert "all-gather" not in program
    sums = len(re.findall(r" all-reduce(?:-start)?\(", program))
    assert sums <= 2 * model.num_layers + 3
    assert (sums > 0) == (devices > 1)


@pytest.mark.parametrize(("chip", "cache_dtype"), [*((chip, None) for chip in CHIPS), ("v5e", "int8")])
def test_nothing_but_kernels_touches_the_pages_of_the_recommended_preset(chip, cache_dtype):
    """Nor their statistics and scales: each is an argument of kernels, and else passed on as it lies.

    Or read ahead, to memory of the chip itself, `S(1)` or `S(3)`, from where a kernel takes it.
    """
    config = preset("mean-key", dense_layers=1, cache_dtype=cache_dtype)
    program = compile_step(chip, 1, NARROW, config, capacity=65536).as_text()
    calls = re.findall(r'custom_call_target="tpu_custom_call".*op_name="\S*?(\w+)/pallas_call', program)
    assert {name: calls.count(name) for name in calls} == KERNELS

    layer = jax.eval_shape(lambda: init_state(NARROW, config, 1, 65536)).layers[-1]
    B, K, P, Z, D = layer.statistics.values.shape
    S = config.page_size
    pages = f"{'s8' if cache_dtype else 'bf16'}[{B},{K},{P},2,{S},{D}]"
    scales = (f"f32[{B},{K},{P},2,{S}]", f"f32[{B},{K},2,{S},{P}]") if cache_dtype else ()
    for sizes in (  # scales have pages along the lanes in memory
        pages,
        *scales,
        f"s8[{B},{K},{P},{Z},{D}]",
        f"s8[{B},{K},{P},{D}]",
        f"f32[{B},{K},{P},{Z}]",
        f"f32[{B},{K},{Z},{P}]",
    ):
        made = {
            name
            for kind, name in re.findall(rf"%\S+ = ([^=]*?{re.escape(sizes)}[^=]*?) ([\w-]+)\(", program)
            if not (name.startswith("copy-") and re.match(r"[^}]*S\([13]\)}", kind))
        }
        assert made
        assert made <= {"parameter", "custom-call", "get-tuple-element", "bitcast", "tuple"}
