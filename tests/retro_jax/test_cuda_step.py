"""What a decode step of Llama-3.1-8B's shape launches, by the real CUDA compiler for an H100."""

import dataclasses
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from retro_jax import DecodeConfig, decode_step, init_state
from retro_jax.experiments.machine.programs import not_cached
from retro_jax.models import random_params, transformer
from retro_jax.models.presets import SIZES
from tests.pallas_kernels.gpu.test_compile import H100

pytestmark = [
    pytest.mark.skipif(
        find_spec("jax_cuda13_plugin") is None, reason="needs the packages of cuda-compiler.txt: make test"
    ),
    pytest.mark.timeout(240),
]
MODEL = SIZES["llama3.1-8b"]
LAUNCHED = "fusion|custom-call|copy|reduce|sort|slice|transpose|convert|select|concatenate|dot"


def program(monkeypatch, config: DecodeConfig, layers: int) -> str:
    """The compiled step of one sequence at 16k tokens, as text."""
    for module in ("dispatch", "update.api", "sums.api"):
        monkeypatch.setattr(f"pallas_kernels.{module}.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr("retro_jax.heads.kernels_of_device", lambda: "mosaic_gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = dataclasses.replace(MODEL, num_layers=layers)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    arguments = jax.eval_shape(
        lambda: (
            random_params(model, jax.random.key(0)),
            init_state(model, config, 1, 16384),
            jnp.zeros(1, jnp.int32),
        )
    )
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)

    def step(params, state, tokens):
        return decode_step(params, model, config, state, tokens)

    with not_cached():
        return jax.jit(step, donate_argnums=1).lower(*arguments).compile().as_text()


def launches(program: str) -> int:
    """Kernels and copies in one run of a program without loops; what has no elements is not launched."""
    computations = re.split(r"\n(?=\S.*\{\n)", program)
    (entry,) = (text for text in computations if text.startswith("ENTRY"))
    entry += "".join(text for text in computations if "command_buffer" in text.partition("\n")[0])
    found = re.findall(rf"^ *(?:ROOT )?%\S+ = (\S+|\(.*?\)) (?:{LAUNCHED})\(", entry, re.M)
    return sum(not re.match(r"\w+\[(?:\d+,)*0[,\]]", shape) for shape in found)


@pytest.mark.parametrize(("method", "most"), (("quest", 39), ("retro", 46)))
def test_few_kernels_are_launched_and_products_of_one_row_are_products(monkeypatch, method, most):
    text = program(monkeypatch, DecodeConfig(method, dense_layers=0), layers=2)
    assert 20 < launches(text) <= most
    # A product that XLA stands in for multiplies a whole matrix by its one row.
    assert "gemm" in text
    assert not re.search(r"\[4096,\d{3,}\]\S* multiply\(", text)


def test_a_narrow_product_of_one_row_is_a_product():
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    shapes = (1, 1, 4096), (4096, 2048)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    with not_cached():
        narrow, plain = (
            jax.jit(f).lower(*arguments).compile().as_text() for f in (transformer.product, jnp.matmul)
        )
    assert "gemm" in narrow and "multiply(" not in narrow
    assert "multiply(" in plain  # else the detour is for nothing
