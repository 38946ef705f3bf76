"""The TPU kernels of attention through the real TPU compiler for every chip, on a machine without a TPU."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import empty_pages
from pallas_kernels.attention.tpu import kernels as attention
from pallas_kernels.attention.tpu.blocks import Blocks
from pallas_kernels.tpu import CHIPS, HEAD_DIMS, PAGE_SIZES
from pallas_kernels.update.tpu import kernels as update
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.compiler import compile_for
from tests.pallas_kernels.inputs import dtype_beside, shapes_of_statistics

pytestmark = [
    pytest.mark.skipif(
        not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test"
    ),
    pytest.mark.timeout(240),
]
B, K, TOKENS = 2, 8, 16384


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes_of_pages(*sizes, dtype):
    return jax.eval_shape(lambda: empty_pages(sizes, jnp.dtype(dtype)))


def retro_shapes(window, group, dim, page_size, dtype=jnp.bfloat16, B=B, K=K, tokens=TOKENS, places=None):
    """Shapes of the arguments of `retro_attention`."""
    P, N = tokens // page_size, K * group
    return (
        shape(B, window, N, dim, dtype=dtype_beside(dtype)),
        shapes_of_pages(B, K, P, 2, page_size, dim, dtype=dtype),
        shape(B, K, places or P // 8, dtype=jnp.int32),
        shape(B, K, dtype=jnp.int32),
        shape(B, K, P, dtype=jnp.int32),
        shape(B, window, dtype=jnp.int32),
        shape(B, window - 1, N, dim, dtype=jnp.float32),
        shape(B, window - 1, N, dtype=jnp.float32),
    )


ROWS = itertools.cycle([(4, 4), (1, 1), (16, 4), (2, 8), (3, 5)])  # (window, group)
CHIP = itertools.cycle(CHIPS)
SHAPES = [
    *(
        (next(CHIP), dim, page_size, *next(ROWS), dtype)
        for dtype, dim, page_size in itertools.product((jnp.bfloat16, jnp.float32), HEAD_DIMS, PAGE_SIZES)
    ),
    *((chip, 128, 32, 4, 4, jnp.bfloat16) for chip in CHIPS),
    ("v4", 128, 32, 4, 4, jnp.int8),
    ("v5p", 256, 32, 1, 8, jnp.float8_e4m3fn),
    ("tpu7x", 128, 64, 4, 4, jnp.float8_e4m3fn),
]


@pytest.mark.parametrize(("chip", "dim", "page_size", "window", "group", "dtype"), SHAPES)
def test_retro_attention(chip, dim, page_size, window, group, dtype):
    shapes = retro_shapes(window, group, dim, page_size, dtype)
    executable = compile_for(chip, attention.retro_attention, *shapes, donate=4, row_major=dim == 64)
    assert "tpu_custom_call" in executable.as_text()
    memory = executable.memory_analysis()
    loaded = shapes[4]
    assert memory.alias_size_in_bytes == loaded.size * 4  # in place
    queries_and_outputs = 4 * B * K * -(-window * group // 8) * 8 * (max(dim, 128) + 128) * 4
    assert memory.temp_size_in_bytes < queries_and_outputs + (1 << 16)
    cost = executable.cost_analysis()
    read = B * K * (shapes[2].shape[-1] * 2 * page_size * dim) * jnp.dtype(dtype).itemsize
    assert cost["bytes accessed"] >= read
    assert cost["flops"] >= 2 * read / jnp.dtype(dtype).itemsize * window * group


@pytest.mark.parametrize(
    ("chip", "tokens", "dim", "dtype"),
    [
        *((chip, *sizes, jnp.bfloat16) for sizes in ((1, 128), (8, 64)) for chip in CHIPS),
        ("v5e", 1, 128, jnp.int8),
    ],
)
def test_dense_attention(chip, tokens, dim, dtype):
    pages = shapes_of_pages(B, K, TOKENS // 16, 2, 16, dim, dtype=dtype)
    q, positions = shape(B, tokens, 4 * K, dim), shape(B, tokens, dtype=jnp.int32)
    executable = compile_for(chip, attention.dense_attention, q, pages, positions, row_major=dim == 64)
    assert "tpu_custom_call" in executable.as_text()
    assert executable.memory_analysis().temp_size_in_bytes < math.prod(pages.shape) // 8


@pytest.mark.parametrize(
    ("chip", "dim", "page_size", "kind", "dtype"),
    [("v4", 256, 16, "min_max", jnp.float8_e4m3fn), ("v6e", 128, 64, "mean_key_int8", jnp.int8)],
)
def test_update_of_pages_in_8_bits(chip, dim, page_size, kind, dtype):
    """In place, and nothing is copied: their scales and those of statistics lie as the kernel takes them."""
    P = TOKENS // page_size
    state = (
        shapes_of_pages(B, K, P, 2, page_size, dim, dtype=dtype),
        shapes_of_statistics(kind, (B, K, P), dim),
    )
    k = v = shape(B, 4, K, dim)
    places = shape(B, dtype=jnp.int32), shape(B, 4, dtype=jnp.bool_)
    memory = compile_for(chip, update.update_pages, *state, k, v, *places, donate=(0, 1)).memory_analysis()
    size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 1 << 16


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_of_64_take_128_lanes_in_memory(chip):
    """By default JAX would avoid that by another order of axes, and every call would copy the cache."""
    shapes = retro_shapes(4, 4, 64, 16)
    pages = 2 * shapes[1].size
    by_default, row_major = (
        compile_for(chip, attention.retro_attention, *shapes, donate=4, row_major=choice).memory_analysis()
        for choice in (False, True)
    )
    assert row_major.argument_size_in_bytes >= 2 * pages
    assert row_major.temp_size_in_bytes < pages // 8
    assert by_default.temp_size_in_bytes >= 2 * pages


def test_rows_of_pages_off_the_lanes():
    """Their row of last_loaded is padded to whole lanes, and so copied, but nothing else is."""
    shapes = retro_shapes(4, 4, 128, 16, tokens=16 * 1000, places=77)
    executable = compile_for("v5e", attention.retro_attention, *shapes, donate=4)
    assert executable.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize(
    ("shapes", "blocks", "message"),
    [
        (retro_shapes(4, 4, 128, 16), Blocks(64, 1000), "needs .* bytes of VMEM, and a v5e has 67108864"),
        (
            retro_shapes(4, 4, 128, 16, B=1, K=1, tokens=1 << 21),
            None,
            "needs .* bytes of SMEM, and a v5e has 1032192",
        ),
        (retro_shapes(4, 4, 128, 8), None, "page_size 8 has no Mosaic TPU kernel"),
        (retro_shapes(4, 4, 128, 16, jnp.float16), None, "dtype float16 has no Mosaic TPU kernel"),
    ],
    ids=["VMEM", "SMEM", "alignment", "dtype"],
)
def test_what_does_not_fit_is_refused_before_it_is_compiled(shapes, blocks, message):
    with pytest.raises(NotImplementedError, match=message):
        compile_for("v5e", functools.partial(attention.retro_attention, blocks=blocks), *shapes)
