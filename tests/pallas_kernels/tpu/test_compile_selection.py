"""Selection and update through the real TPU compiler for every chip, on a machine without a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import SCORES
from pallas_kernels.selection.tpu import kernels as selection
from pallas_kernels.tpu import CHIPS
from pallas_kernels.update.tpu import kernels as update
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.compiler import compile_for
from tests.pallas_kernels.inputs import shapes_of_statistics

pytestmark = [
    pytest.mark.skipif(
        not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test"
    ),
    pytest.mark.timeout(120),
]


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def integers(*sizes):
    return shape(*sizes, dtype=jnp.int32)


SELECTIONS = [  # batch, KV heads, group, pages, page size, head_dim, statistics, reduction, dtype
    (1, 8, 4, 2048, 16, 128, "min_max", "mean", jnp.bfloat16),
    (2, 8, 4, 8192, 16, 128, "min_max", "max", jnp.bfloat16),
    (1, 8, 4, 8192, 16, 128, "mean_key", "mean", jnp.bfloat16),
    (4, 3, 3, 300, 32, 64, "min_max", "mean", jnp.bfloat16),
    (1, 32, 1, 1000, 128, 256, "min_max", "mean", jnp.bfloat16),
    (2, 2, 9, 513, 64, 128, "min_max", "max", jnp.float32),
    (1, 1, 8, 40, 16, 256, "mean_key", "max", jnp.float32),
    (1, 8, 4, 8192, 16, 128, "mean_key_int8", "mass", jnp.bfloat16),
    (2, 3, 9, 520, 16, 128, "mean_key_int8", "max", jnp.bfloat16),
    (1, 9, 1, 5, 16, 256, "min_max", "mass", jnp.float32),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", SELECTIONS)
def test_selection(chip, case):
    B, K, group, pages, page_size, dim, kind, group_reduce, dtype = case
    statistics = shapes_of_statistics(kind, (B, K, pages), dim, dtype)
    function = functools.partial(
        selection.select_pages,
        page_size=page_size,
        capacity=-(-pages // 7),
        score=next(name for name, score in SCORES.items() if kind in score.statistics),
        group_reduce=group_reduce,
        sink_pages=1,
    )
    q = shape(B, K * group, dim, dtype=dtype)
    executable = compile_for(chip, function, q, statistics, *[integers(B)] * 2, row_major=dim == 64)
    assert "tpu_custom_call" in executable.as_text()
    assert executable.memory_analysis().temp_size_in_bytes < 2**18
    cost = executable.cost_analysis()
    assert cost["flops"] >= 2 * group * statistics.values.size
    assert cost["bytes accessed"] >= statistics.values.size * statistics.values.dtype.itemsize


UPDATES = [  # batch, KV heads, pages, page size, head_dim, tokens, statistics, dtype
    (1, 8, 2048, 16, 128, 4, "min_max", jnp.bfloat16),
    (8, 8, 8192, 16, 128, 1, "mean_key", jnp.bfloat16),
    (2, 9, 300, 32, 256, 16, "min_max", jnp.bfloat16),
    (1, 32, 256, 128, 128, 32, None, jnp.bfloat16),
    (3, 2, 512, 64, 128, 8, "mean_key", jnp.float32),
    (2, 8, 64, 16, 64, 4, "min_max", jnp.float32),
    (1, 8, 8192, 16, 128, 8, "mean_key_int8", jnp.bfloat16),
    (2, 9, 1000, 32, 256, 1, "mean_key_int8", jnp.bfloat16),
    (2, 2, 5, 16, 128, 4, "mean_key_int8", jnp.bfloat16),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", UPDATES)
def test_update(chip, case):
    B, K, P, page_size, dim, tokens, kind, dtype = case
    pages = shape(B, K, P, 2, page_size, dim, dtype=dtype)
    statistics = shapes_of_statistics(kind, (B, K, P), dim, dtype)
    k = v = shape(B, tokens, K, dim, dtype=dtype)
    arguments = pages, statistics, k, v, integers(B), shape(B, tokens, dtype=jnp.bool_)
    executable = compile_for(chip, update.update_pages, *arguments, donate=(0, 1), row_major=dim == 64)
    assert "tpu_custom_call" in executable.as_text()
    memory = executable.memory_analysis()
    state = jax.tree.leaves((pages, statistics))
    assert memory.alias_size_in_bytes >= sum(array.size * array.dtype.itemsize for array in state)
    assert memory.temp_size_in_bytes < 2**20
