"""What devices that share a model exchange in one decode step: two sums a layer, as in any transformer."""

import dataclasses
import re
from collections import Counter
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import retro_jax as rj
from pallas_kernels.sums.gpu import peers
from retro_jax.compilation import SEVERAL_GPUS
from retro_jax.experiments.machine.programs import not_cached
from retro_jax.experiments.runs.compile import COLLECTIVES
from retro_jax.models import ModelConfig
from retro_jax.sharding import abstract_arguments
from tests.pallas_kernels.gpu.test_compile import H100

MODEL = ModelConfig(
    name="two",
    vocab_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    width=32,
    hidden_width=64,
    max_positions=256,
    dtype="float32",
)
PAGES = {"page_size": 8, "budget_tokens": 32}
EXCHANGED = rf" ({'|'.join(COLLECTIVES)})(?:-start)?\("


def exchanged(program: str) -> Counter[str]:
    """How many collectives of each kind a compiled program has; one may sum arrays of several places."""
    return Counter(re.findall(EXCHANGED, program))


def check(program: str, layers: int) -> None:
    """Every collective is a sum: two a layer, and one of what the metrics count, which may go along."""
    found = exchanged(program)
    assert set(found) == {"all-reduce"}
    assert 2 * layers <= found["all-reduce"] <= 2 * layers + 1


def lowered(
    model: ModelConfig, config: rj.DecodeConfig, mesh: jax.sharding.Mesh, steps: int | None = None
) -> jax.stages.Lowered:
    """A step of two sequences, or a loop of some, from shapes alone."""
    function, more = (rj.decode_step, {}) if steps is None else (rj.decode, {"steps": steps})
    with jax.set_mesh(mesh):
        params, state = abstract_arguments(model, config, mesh, 2, 256)
        step = jax.jit(function, static_argnames=("model", "config", *more), donate_argnames="state")
        return step.lower(params, model, config, state, jax.ShapeDtypeStruct((2,), jnp.int32), **more)


@pytest.mark.parametrize(
    ("mesh", "config"),
    (
        ((2, 2), rj.DecodeConfig("retro", group_reduce="mass", anchor_every=2, dense_layers=1, **PAGES)),
        ((1, 2), rj.preset("mean-key", method="retro", window=3, residual_pages=2, dense_layers=1, **PAGES)),
    ),
)
def test_references_sum_twice_a_layer_and_gather_nothing(mesh, config):
    check(lowered(MODEL, config, rj.make_mesh(*mesh)).compile().as_text(), MODEL.num_layers)


@pytest.fixture
def two_gpus(monkeypatch):
    """A program of one layer of a width for two linked H100s that reach each other's memory."""

    def compiled(width: int, steps: int | None = None) -> str:
        for module in ("dispatch", "update.api", "sums.api"):
            monkeypatch.setattr(f"pallas_kernels.{module}.kernels_of_device", lambda: "mosaic_gpu")
        monkeypatch.setattr(peers, "reach_each_other", lambda: True)
        linked = H100.replace("core_count", "device_interconnect_info { active_links: 18 } core_count", 1)
        topology = topologies.get_topology_desc(platform="cuda", target_config=linked, topology="1x1x2")
        model = dataclasses.replace(
            MODEL, num_layers=1, head_dim=128, width=width, hidden_width=256, dtype="bfloat16"
        )
        config = rj.DecodeConfig("quest", dense_layers=0, budget_tokens=64)
        with not_cached():
            step = lowered(model, config, rj.make_mesh(1, 2, topology.devices), steps)
            return step.compile(compiler_options=SEVERAL_GPUS).as_text()

    return compiled


NEEDS_CUDA = pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None, reason="needs the packages of cuda-compiler.txt"
)


@NEEDS_CUDA
def test_kernels_of_two_gpus_sum_twice_a_layer_and_gather_nothing(two_gpus):
    program = two_gpus(256)  # of a width without a kernel for sums
    assert len(re.findall("mosaic_gpu", program)) > 3
    # By XLA's own choice it would be KERNEL_STRATEGY_TRITON_ONE_SHOT, which CUDA graphs cannot hold.
    assert set(re.findall(r"KERNEL_STRATEGY_\w+", program)) == {"KERNEL_STRATEGY_DEFAULT"}
    check(program, layers=1)


@NEEDS_CUDA
def test_gpus_that_reach_each_other_sum_by_themselves(two_gpus):
    """Left to XLA in a step of a loop are addresses, the most likely tokens, and sums of a few numbers."""
    program = two_gpus(1024, steps=2)
    assert exchanged(program) == {"all-gather": 2, "all-reduce": 2}
    gathered = [line.split(" all-gather")[0] for line in program.splitlines() if " all-gather" in line]
    assert not any("64]" in shapes for shapes in gathered)  # of the vocabulary's logits
    sums = [line for line in program.splitlines() if "custom-call(" in line and "/add_sum/" in line]
    assert len(sums) == 2
    # A copy of the cells would not be where others write; XLA makes none where all change them in place.
    assert all("output_to_operand_aliasing" in line for line in sums)
    assert not any("bf16[1,2,2,2,1024]" in line for line in program.splitlines() if " copy(" in line)
