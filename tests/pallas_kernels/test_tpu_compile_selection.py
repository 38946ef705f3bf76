"""Selection and update through the real TPU compiler for every chip, on a machine without a TPU."""

import functools
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from pallas_kernels.selection import mosaic_tpu as selection
from pallas_kernels.tpu import CHIPS
from pallas_kernels.update import mosaic_tpu as update

pytestmark = [
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu on the path"),
    pytest.mark.timeout(120),
]
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# The compiler asks for a TPU's machine otherwise, and locks it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture(params=CHIPS)
def compiled(request):
    """Compiles a function of shapes for a chip."""
    os.environ.update(ENVIRONMENT)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[request.param])
    device = topology.devices[0]
    mesh = Mesh(np.array([device]), ("device",)).abstract_mesh

    def compile_for_chip(function, *shapes, donate=()):
        sharding = SingleDeviceSharding(device)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        with jax.sharding.use_abstract_mesh(mesh):
            executable = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
        assert "tpu_custom_call" in executable.as_text()
        return executable

    return compile_for_chip


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def integers(*sizes):
    return shape(*sizes, dtype=jnp.int32)


SELECTIONS = [  # batch, KV heads, group, pages, page size, head_dim, score, reduction, dtype
    (1, 8, 4, 2048, 16, 128, "bounds", "mean", jnp.bfloat16),
    (2, 8, 4, 8192, 16, 128, "bounds", "max", jnp.bfloat16),
    (1, 8, 4, 8192, 16, 128, "mean_key", "mean", jnp.bfloat16),
    (4, 3, 3, 300, 32, 64, "bounds", "mean", jnp.bfloat16),
    (1, 32, 1, 1000, 128, 256, "bounds", "mean", jnp.bfloat16),
    (2, 2, 9, 513, 64, 128, "bounds", "max", jnp.float32),
    (1, 1, 8, 40, 16, 256, "mean_key", "max", jnp.float32),
]


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection(compiled, case):
    B, K, group, pages, page_size, dim, score, group_reduce, dtype = case
    statistics = shape(B, K, pages, 2 if score == "bounds" else 1, dim, dtype=dtype)
    function = functools.partial(
        selection.select_pages,
        page_size=page_size,
        capacity=-(-pages // 7),
        score=score,
        group_reduce=group_reduce,
        sink_pages=1,
    )
    executable = compiled(function, shape(B, K * group, dim, dtype=dtype), statistics, *[integers(B)] * 2)
    assert executable.cost_analysis()["flops"] >= 2 * group * statistics.size
    if dim >= 128:  # XLA lays shorter vectors out with pages along the lanes, and copies them
        assert executable.memory_analysis().temp_size_in_bytes < 2**18


UPDATES = [  # batch, KV heads, pages, page size, head_dim, tokens, statistics, dtype
    (1, 8, 2048, 16, 128, 4, "min_max", jnp.bfloat16),
    (8, 8, 8192, 16, 128, 1, "mean_key", jnp.bfloat16),
    (2, 9, 300, 32, 256, 16, "min_max", jnp.bfloat16),
    (1, 32, 256, 128, 128, 32, None, jnp.bfloat16),
    (3, 2, 512, 64, 128, 8, "mean_key", jnp.float32),
    (2, 8, 64, 16, 64, 4, "min_max", jnp.float32),
]


@pytest.mark.parametrize("case", UPDATES)
def test_update(compiled, case):
    B, K, P, page_size, dim, tokens, kind, dtype = case
    pages = shape(B, K, P, 2, page_size, dim, dtype=dtype)
    vectors = 2 if kind == "min_max" else 1
    statistics = shape(B, K, P, vectors, dim, dtype=dtype) if kind else None
    k = v = shape(B, tokens, K, dim, dtype=dtype)
    function = functools.partial(update.update_pages, kind=kind or "min_max")
    executable = compiled(
        function, pages, statistics, k, v, integers(B), shape(B, tokens, dtype=jnp.bool_), donate=(0, 1)
    )
    memory = executable.memory_analysis()
    state = [array for array in (pages, statistics) if array is not None]
    assert memory.alias_size_in_bytes >= sum(array.size * array.dtype.itemsize for array in state)
    if dim >= 128:
        assert memory.temp_size_in_bytes < 2**20
