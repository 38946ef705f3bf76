"""The TPU kernels of attention in the TPU interpreter, which finds races and reads of unwritten memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference
from pallas_kernels.attention.tpu import kernels as attention
from pallas_kernels.attention.tpu.blocks import Blocks
from pallas_kernels.attention.tpu.page_stream import PageStream
from pallas_kernels.attention.tpu.scales import Scales
from pallas_kernels.tpu import CHIPS
from tests.pallas_kernels.equality import assert_close
from tests.pallas_kernels.inputs import PAGES, dtype_beside, pages_as, random_cache, random_retro_inputs

pytestmark = pytest.mark.timeout(120)
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 5e-3}
"""Relative: of float32 sums in another order, and of weights that are rounded to bfloat16."""


def run(function, *args, interpret=INTERPRET, **kwargs):
    """Runs a kernel in the interpreter; what it gives, and whether races were found."""
    pltpu.reset_tpu_interpret_mode_state()
    result = jax.block_until_ready(jax.jit(functools.partial(function, interpret=interpret, **kwargs))(*args))
    return result, interpret_pallas_call.races.races_found


def inputs_of(lengths, window, group, page_size, dim, dtype, heads=2):
    """Random arguments of `retro_attention`; pages that are not selected hold NaN, or their scales do."""
    rng = np.random.default_rng(window)
    q, pages, page_ids, counts, *rest = random_retro_inputs(
        rng, lengths, window, group, page_size, heads=heads, dim=dim
    )
    place = np.arange(page_ids.shape[-1]) < counts[..., None]
    selected = np.zeros(pages.shape[:3], bool)
    for b, head, c in np.argwhere(place):
        selected[b, head, page_ids[b, head, c]] = True
    pages[~selected] = np.nan
    q = jnp.asarray(q, dtype_beside(dtype))
    return q, pages_as(pages, dtype), *map(jnp.asarray, (page_ids, counts, *rest))


def assert_equals_the_reference(inputs, result):
    o, lse, last_loaded = result
    expected = jax.jit(reference.retro_attention)(*inputs)
    tolerance = TOLERANCE[inputs[0].dtype.type]
    assert_close(o, expected[0], tolerance)
    assert_close(lse, expected[1], tolerance)
    np.testing.assert_array_equal(last_loaded, expected[2])


@pytest.mark.parametrize(
    ("window", "group", "page_size", "dim", "dtype", "blocks"),
    [
        (1, 1, 16, 128, jnp.bfloat16, Blocks(8, 1)),
        (4, 3, 16, 64, jnp.float32, Blocks(8, 2)),
        (3, 2, 32, 64, jnp.bfloat16, Blocks(4, 3)),
        (2, 8, 64, 256, jnp.float32, Blocks(2, 1)),
        (2, 1, 128, 128, jnp.bfloat16, Blocks(1, 2)),
        (2, 3, 16, 64, jnp.int8, Blocks(8, 2)),
        (2, 2, 32, 128, jnp.float8_e4m3fn, Blocks(4, 1)),
    ],
)
def test_retro_attention_equals_the_reference(window, group, page_size, dim, dtype, blocks):
    inputs = inputs_of([7 * page_size + 3, page_size, 2], window, group, page_size, dim, dtype)
    result, races = run(attention.retro_attention, *inputs, blocks=blocks)
    assert not races
    assert_equals_the_reference(inputs, result)


def test_no_slot_sees_pages_beyond_its_position_and_a_slot_without_a_query_none():
    inputs = list(inputs_of([40, 70], 2, 2, 16, 64, jnp.float32))
    pages, page_ids, counts = (np.asarray(x).copy() for x in inputs[1:4])
    page_ids[:, :, :3], counts[:] = [9, 0, 2], 3  # page 9 lies beyond both sequences
    written = np.arange(PAGES * 16).reshape(PAGES, 16) < np.asarray([40, 70])[:, None, None]
    pages[:] = np.where(written[:, None, :, None, :, None], 0.5, np.nan)
    inputs[1:4] = (jnp.asarray(x) for x in (pages, page_ids, counts))
    inputs[5] = inputs[5].at[1, -1].set(-1)
    result, races = run(attention.retro_attention, *inputs, blocks=Blocks(8, 1))
    assert not races
    assert_equals_the_reference(inputs, result)


def test_each_of_two_cores_takes_half_of_the_items(monkeypatch):
    monkeypatch.setattr(attention, "chip", lambda: CHIPS["v5p"])
    inputs = inputs_of([99, 40, 2], 2, 2, 16, 64, jnp.float32)
    two = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    result, races = run(attention.retro_attention, *inputs, interpret=two, blocks=Blocks(8, 1))
    assert not races
    assert_equals_the_reference(inputs, result)


def test_retro_attention_without_any_page_keeps_the_cached_output():
    inputs = list(inputs_of([40, 70], 3, 2, 16, 64, jnp.bfloat16))
    inputs[3] = jnp.zeros_like(inputs[3])
    (o, lse, last_loaded), races = run(attention.retro_attention, *inputs, blocks=Blocks(8, 2))
    assert not races
    np.testing.assert_array_equal(last_loaded, inputs[4])
    assert_close(o[:, :-1], inputs[6], 1e-6)
    assert np.isneginf(lse[:, -1]).all()
    assert (o[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "dtype", "blocks"),
    [
        (1, jnp.bfloat16, Blocks(8, 1)),
        (3, jnp.float32, Blocks(8, 2)),
        (1, jnp.float32, None),
    ],
)
def test_dense_attention_equals_the_reference(tokens, dtype, blocks):
    rng = np.random.default_rng(0)
    lengths = [PAGES * 16, 101, 3]
    pages = pages_as(random_cache(rng, [*lengths, 0], 16, dim=64), dtype)
    q = jnp.asarray(rng.standard_normal((4, tokens, 6, 64)), dtype_beside(dtype))
    positions = np.asarray([*lengths, 0])[:, None] - tokens + np.arange(tokens)
    positions = jnp.asarray(np.where(np.arange(4)[:, None] < 3, positions, -1), jnp.int32)
    o, races = run(attention.dense_attention, q, pages, positions, blocks=blocks)
    assert not races
    expected = jax.jit(reference.dense_attention)(q, pages, positions)
    assert_close(o, expected, TOLERANCE[q.dtype.type])


def test_8_bits_beside_queries_in_float32_lose_nothing_more():
    """Their scales lie in two registers, the second one of which is not whole."""
    rng = np.random.default_rng(0)
    pages = pages_as(random_cache(rng, [128 * 64 + 3, 0], 64, heads=1, dim=64, num_pages=129), "int8")
    q = jnp.asarray(rng.standard_normal((2, 1, 2, 64)), jnp.float32)
    positions = jnp.asarray([[128 * 64 + 2], [-1]])
    o, races = run(attention.dense_attention, q, pages, positions, blocks=Blocks(16, 1))
    assert not races
    assert_close(o, jax.jit(reference.dense_attention)(q, pages, positions), TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ("of", "name", "dtype"),
    [(PageStream, "_wait", jnp.float32), (Scales, "wait", jnp.int8)],
    ids=["pages", "scales"],
)
def test_the_interpreter_finds_a_read_before_its_copy_arrived(monkeypatch, of, name, dtype):
    monkeypatch.setattr(of, name, lambda *_: None)
    inputs = inputs_of([99], 2, 2, 16, 64, dtype)
    eager = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="eager")
    _, races = run(attention.retro_attention, *inputs, interpret=eager, blocks=Blocks(8, 1))
    assert races


def bfloat16(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("q", "pages", "message"),
    [
        (
            bfloat16(1, 1, 2, 96),
            bfloat16(1, 2, 4, 2, 16, 96),
            r"head_dim 96 has no Mosaic TPU kernel \(64, 128, 256\)",
        ),
        (
            bfloat16(1, 1, 2, 64),
            bfloat16(1, 2, 4, 2, 8, 64),
            r"page_size 8 has no Mosaic TPU kernel \(16, 32, 64, 128\)",
        ),
        (
            jnp.zeros((1, 1, 2, 64), jnp.float16),
            jnp.zeros((1, 2, 4, 2, 16, 64), jnp.float16),
            r"dtype float16 has no Mosaic TPU kernel \(bfloat16, float32\)",
        ),
        (jnp.zeros((1, 1, 2, 64)), bfloat16(1, 2, 4, 2, 16, 64), "q is float32 and pages are bfloat16"),
        (
            bfloat16(1, 33, 8, 64),
            bfloat16(1, 2, 4, 2, 16, 64),
            r"33 slots x 4 heads .* more than the 128 rows",
        ),
        (
            bfloat16(1, 1, 2, 64),
            pages_as(np.zeros((1, 2, 4, 2, 128, 64), np.float32), "int8"),
            r"page_size_in_8_bits 128 has no Mosaic TPU kernel \(16, 32, 64\)",
        ),
        (
            jnp.zeros((1, 1, 2, 64), jnp.float16),
            pages_as(np.zeros((1, 2, 4, 2, 16, 64), np.float32), "int8"),
            r"dtype float16 has no Mosaic TPU kernel \(bfloat16, float32\)",
        ),
    ],
)
def test_attention_refuses_what_it_does_not_support(q, pages, message):
    with pytest.raises(NotImplementedError, match=message):
        attention.dense_attention(q, pages, jnp.zeros(q.shape[:2], jnp.int32))
