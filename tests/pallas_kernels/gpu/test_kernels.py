"""The Hopper kernels in the Mosaic GPU interpreter, which finds races and reads of what was never written."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP_REDUCE, STATISTICS, Statistics
from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.attention.gpu import kernels as attention
from pallas_kernels.attention.gpu.blocks import Blocks
from pallas_kernels.gpu import kernel
from pallas_kernels.selection import reference as selection_reference
from pallas_kernels.selection.gpu import kernels as selection
from pallas_kernels.sliding import reference as sliding_reference
from pallas_kernels.update.gpu import kernels as update
from tests.pallas_kernels.equality import (
    FUSED,
    SCORED,
    assert_close,
    assert_same_heads,
    assert_same_selection,
    assert_same_update,
)
from tests.pallas_kernels.inputs import (
    PAGES,
    dtype_beside,
    pages_as,
    random_cache,
    random_product,
    random_retro_inputs,
    random_statistics,
    random_update,
)

pytestmark = pytest.mark.timeout(180)
GROUPS = itertools.cycle([(3, 1), (9, 0), (1, 2), (8, 1), (4, 1), (7, 0), (2, 2)])
"""Query heads of a group, and sink pages."""
SELECTIONS = itertools.cycle([(152, 8, 64), (40, 32, 256), (88, 16, 128), (520, 16, 128), (64, 64, 64)])
"""Pages, page size and head_dim."""
KINDS = FUSED["mosaic_gpu"]
UPDATES = itertools.cycle([(4, 16, 64), (1, 32, 128), (17, 16, 256), (3, 64, 64)])
"""Tokens, page size and head_dim."""
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def interpreted(function, **kwargs):
    """A kernel in the interpreter, compiled once; a call fails if it finds a race."""
    program = jax.jit(functools.partial(function, interpret=INTERPRET, **kwargs))

    def run(*args):
        result = jax.block_until_ready(program(*args))
        assert not gpu_callbacks.get_races().races_found
        return result

    return run


def run(function, *args, **kwargs):
    """Runs a kernel in the interpreter; fails if it finds a race."""
    return interpreted(function, **kwargs)(*args)


def test_the_interpreter_finds_a_planted_race():
    def body(out_ref):
        out_ref[0] = jax.lax.axis_index("block")

    launch = kernel(
        body,
        name="race",
        out_type=[jax.ShapeDtypeStruct((1,), jnp.int32)],
        grid=(2,),
        grid_names=("block",),
        interpret=INTERPRET,
    )
    jax.block_until_ready(jax.jit(launch)())
    assert gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("window", "group", "page_size", "dim", "dtype", "blocks"),
    [
        (1, 1, 16, 64, jnp.bfloat16, Blocks(4, 2, 2)),
        (4, 3, 16, 64, jnp.bfloat16, Blocks(2, 2, 3)),
        (3, 2, 32, 64, jnp.float16, Blocks(2, 4, 2)),
        (2, 2, 32, 64, jnp.bfloat16, Blocks(1, 2, 2)),
        (2, 4, 64, 128, jnp.bfloat16, Blocks(1, 2, 2)),
        (2, 1, 16, 256, jnp.bfloat16, Blocks(2, 2, 1, warpgroups=1)),
        (3, 2, 8, 64, jnp.bfloat16, Blocks(4, 2, 2)),
        (4, 3, 16, 64, jnp.int8, Blocks(4, 2, 2)),
        (2, 2, 8, 128, jnp.float8_e4m3fn, Blocks(8, 2, 2)),
        (1, 4, 32, 64, jnp.float8_e4m3fn, Blocks(2, 2, 1, warpgroups=1)),
    ],
)
def test_retro_attention_equals_the_reference(window, group, page_size, dim, dtype, blocks):
    rng = np.random.default_rng(window)
    lengths = [7 * page_size + 3, page_size, 2]
    inputs = random_retro_inputs(rng, lengths, window, group, page_size, dim=dim)
    q, pages, *rest = map(jnp.asarray, inputs)
    inputs = q.astype(dtype_beside(dtype)), pages_as(pages, dtype), *rest
    o, lse, last_loaded = run(attention.retro_attention, *inputs, blocks=blocks)
    expected = jax.jit(attention_reference.retro_attention)(*inputs)
    assert_close(o, expected[0], 5e-3)
    assert_close(lse, expected[1], 1e-3)
    np.testing.assert_array_equal(last_loaded, expected[2])


@pytest.mark.parametrize(
    ("window", "group", "dim", "dtype"), [(4, 3, 64, jnp.bfloat16), (6, 1, 128, jnp.float32)]
)
def test_a_window_moves_the_output_cache_of_active_sequences_on(window, group, dim, dtype):
    rng = np.random.default_rng(window)
    q, pages, *rest = map(jnp.asarray, random_retro_inputs(rng, [70, 16], window, group, 16, dim=dim))
    inputs = q.astype(jnp.bfloat16), pages.astype(jnp.bfloat16), *rest, jnp.array([True, False])
    got = run(attention.attend_window, *inputs, dtype=dtype, blocks=Blocks(2, 2, 2))
    expected = jax.jit(functools.partial(attention_reference.attend_window, dtype=dtype))(*inputs)
    assert [(array.shape, array.dtype) for array in got] == [(array.shape, array.dtype) for array in expected]
    for array, wanted, tolerance in zip(got, expected, (5e-3, 1e-3, 0.0, 5e-3, 1e-3, 0.0), strict=True):
        if tolerance:
            assert_close(array, wanted, tolerance)
    for array, wanted in ((got[2], expected[2]), (got[3][1], inputs[6][1]), (got[4][1], inputs[7][1])):
        np.testing.assert_array_equal(array, wanted)
    selected = np.arange(inputs[2].shape[2]) < np.asarray(inputs[3])[..., None]
    assert selected.any()
    np.testing.assert_array_equal(np.asarray(got[5])[selected], np.asarray(expected[5])[selected])


def test_retro_attention_without_any_page_keeps_the_cached_output():
    rng = np.random.default_rng(0)
    q, pages, page_ids, counts, *rest = map(jnp.asarray, random_retro_inputs(rng, [40], 3, 2, 16, dim=64))
    inputs = q.astype(jnp.bfloat16), pages.astype(jnp.bfloat16), page_ids, jnp.zeros_like(counts), *rest
    o, lse, last_loaded = run(attention.retro_attention, *inputs, blocks=Blocks(4, 2, 2))
    np.testing.assert_array_equal(last_loaded, inputs[4])
    assert_close(o[:, :-1], inputs[6], 1e-6)
    assert np.isneginf(lse[:, -1]).all()
    assert (o[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("page_size", "dtype", "blocks"),
    [
        (16, jnp.bfloat16, Blocks(4, 2, 2)),
        (16, jnp.bfloat16, Blocks(2, 4, 3)),
        (16, jnp.bfloat16, Blocks(4, 1, 1, warpgroups=1)),
        (8, jnp.bfloat16, Blocks(8, 2, 2)),
        (8, jnp.int8, Blocks(8, 2, 2)),
        (16, jnp.float8_e4m3fn, Blocks(4, 2, 2)),
    ],
)
def test_dense_attention_equals_the_reference(page_size, dtype, blocks):
    rng = np.random.default_rng(0)
    lengths = [PAGES * page_size, 6 * page_size + 5, 1, 0]
    pages = pages_as(random_cache(rng, lengths, page_size, dim=64), dtype)
    q = jnp.asarray(rng.standard_normal((4, 1, 6, 64)), jnp.bfloat16)
    positions = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    o = run(attention.dense_attention, q, pages, positions, blocks=blocks)
    assert_close(o, jax.jit(attention_reference.dense_attention)(q, pages, positions), 5e-3)


@pytest.mark.parametrize(
    ("window", "slots", "ring", "page_size", "dtype", "blocks"),
    [
        (43, 3, 45, 16, jnp.bfloat16, Blocks(2, 2, 2)),  # what is hidden goes around the end of a ring
        (9, 1, 16, 8, jnp.int8, Blocks(8, 2, 1, warpgroups=1)),
    ],
)
def test_window_attention_equals_the_reference(window, slots, ring, page_size, dtype, blocks):
    """In rings that were written over, that are not full yet, and with slots that have no query."""
    rng = np.random.default_rng(0)
    newest = np.array([2 * ring + 1, 5 * ring, ring - 2, -1])
    filled = np.minimum(newest + 1, ring)
    pages = random_cache(rng, filled, page_size, dim=64, num_pages=-(-ring // page_size))
    positions = newest[:, None] + np.arange(1 - slots, 1)
    positions = np.where((positions < 0) | (positions == 5 * ring - 1), -1, positions)
    q = jnp.asarray(rng.standard_normal((len(newest), slots, 4, 64)), jnp.bfloat16)
    arguments = q, pages_as(pages, dtype), jnp.asarray(positions, jnp.int32), jnp.linspace(-2, 2, 4)
    o = run(attention.window_attention, *arguments, window=window, ring=ring, blocks=blocks)
    expected = functools.partial(sliding_reference.window_attention, window=window, ring=ring)
    assert_close(o, jax.jit(expected)(*arguments), 5e-3)


@pytest.mark.parametrize(("page_size", "num_pages", "dtype"), [(16, 1, jnp.bfloat16), (8, 3, jnp.int8)])
def test_a_cache_may_be_smaller_than_a_stage(page_size, num_pages, dtype):
    rng = np.random.default_rng(0)
    lengths = [num_pages * page_size - 3, 1]
    q, pages, *rest = map(
        jnp.asarray, random_retro_inputs(rng, lengths, 2, 3, page_size, dim=64, num_pages=num_pages)
    )
    q, pages = q.astype(jnp.bfloat16), pages_as(pages, dtype)
    o = run(attention.dense_attention, q, pages, rest[3])
    assert_close(o, jax.jit(attention_reference.dense_attention)(q, pages, rest[3]), 5e-3)
    o, lse, _ = run(attention.retro_attention, q, pages, *rest)
    expected = jax.jit(attention_reference.retro_attention)(q, pages, *rest)
    assert_close(o, expected[0], 5e-3)
    assert_close(lse, expected[1], 1e-3)


@pytest.mark.parametrize(
    ("score", "kind", "group_reduce", "parts", "group", "sink_pages", "pages", "page_size", "dim"),
    [
        (*scored, reduce, parts, *next(GROUPS), *next(SELECTIONS))
        for scored, (reduce, parts) in itertools.product(
            SCORED["mosaic_gpu"], zip(GROUP_REDUCE, itertools.cycle((1, 2)), strict=False)
        )
    ]
    + [("mean_key", "mean_key_int8", "mass", 2, 3, 1, 72, 8, 16)],
)
def test_selection_equals_the_reference(
    score, kind, group_reduce, parts, group, sink_pages, pages, page_size, dim
):
    rng = np.random.default_rng(group)
    B, K, capacity = 4, 2, min(80, pages)
    positions = np.array([pages * page_size - 5, pages * page_size // 2, 3, -1])
    statistics = random_statistics(rng, positions + 1, page_size, K, pages, kind, dim, jnp.bfloat16)
    q = jnp.asarray(2 * rng.standard_normal((B, K * group, dim)), jnp.bfloat16)
    arguments = {
        "page_size": page_size,
        "capacity": capacity,
        "score": score,
        "group_reduce": group_reduce,
        "sink_pages": sink_pages,
    }
    select = interpreted(selection.select_pages, parts=parts, **arguments)
    for budgets in ([40, 19, 3, 0], [pages // 2 + 1, 0, 80, 4]):
        inputs = (
            q,
            statistics,
            jnp.asarray(positions, jnp.int32),
            jnp.minimum(jnp.asarray(budgets, jnp.int32), capacity),
        )
        assert_same_selection(select(*inputs), inputs, **arguments)


@pytest.mark.parametrize(
    ("parts", "kind", "group_reduce"),
    [(1, "mean_key", "mean"), (2, "mean_key", "mean"), (2, "mean_key_int8", "mass")],
)
def test_ties_go_to_the_lower_page(parts, kind, group_reduce):
    """All pages score alike, or there are eight scores, of both signs and zero; none of them rounds."""
    scores = np.array([0.0, -1.0, 2.0, -3.0, 1.0, -0.5, -2.0, 0.25] * 9)
    scores = np.stack([np.full(72, 0.5), scores])[:, None, :, None, None]
    inputs = (
        jnp.ones((2, 1, 64), jnp.bfloat16),
        STATISTICS[kind].keep(jnp.asarray(np.tile(scores, (1, 1, 1, 1, 64)), jnp.bfloat16)),
        jnp.asarray([70 * 16, 72 * 16 - 1], jnp.int32),
        jnp.asarray([37, 50], jnp.int32),
    )
    arguments = {
        "page_size": 16,
        "capacity": 50,
        "score": "mean_key",
        "group_reduce": group_reduce,
        "sink_pages": 0,
    }
    ids, counts = run(selection.select_pages, *inputs, parts=parts, **arguments)
    expected = jax.jit(functools.partial(selection_reference.select_pages, **arguments))(*inputs)
    np.testing.assert_array_equal(counts, expected[1])
    for row, expected_row, count in zip(ids[:, 0], expected[0][:, 0], counts[:, 0], strict=True):
        assert sorted(row[:count].tolist()) == sorted(expected_row[:count].tolist())


@pytest.mark.parametrize(
    ("tokens", "page_size", "dim", "kind", "dtype"),
    [
        *((*next(UPDATES), kind, jnp.bfloat16) for kind in (*KINDS, *KINDS, None)),
        (5, 8, 64, "min_max", jnp.bfloat16),
        (4, 16, 64, "min_max", jnp.int8),
        (3, 8, 128, "mean_key_int8", jnp.int8),
        (9, 8, 64, None, jnp.float8_e4m3fn),
        (2, 32, 64, "mean_key", jnp.float8_e4m3fn),
    ],
)
def test_update_equals_the_reference(tokens, page_size, dim, kind, dtype):
    rng = np.random.default_rng(tokens)
    lengths = [5 * page_size + 3, page_size, 2, page_size + 1]
    inputs = random_update(rng, lengths, tokens, page_size, 2, dim, kind, dtype)
    inputs[5] = inputs[5].at[3].set(False)
    assert_same_update(run(update.update_pages, *inputs), inputs)


@pytest.mark.parametrize(
    ("tokens", "page_size", "group", "dim", "kind", "dtype", "made"),
    [
        (4, 16, 2, 64, "min_max", jnp.bfloat16, ("rope",)),
        (1, 8, 3, 128, None, jnp.bfloat16, ("rope", "norms", "scale")),
        (3, 16, 1, 64, "mean_key_int8", jnp.int8, ("rope", "bias")),
        (2, 16, 2, 64, "mean_key", jnp.bfloat16, ()),
    ],
)
def test_update_from_a_product_equals_the_reference(tokens, page_size, group, dim, kind, dtype, made):
    rng = np.random.default_rng(tokens)
    lengths = [5 * page_size + 3, 2, page_size + 1]
    inputs, options = random_product(rng, lengths, tokens, page_size, group, dim, kind, dtype, made)
    inputs[-1] = inputs[-1].at[2].set(False)
    assert_same_heads(run(update.update_from_product, *inputs, **options), inputs, options)


def bfloat16(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("q", "pages", "message"),
    [
        (
            bfloat16(1, 1, 2, 96),
            bfloat16(1, 2, 4, 2, 16, 96),
            r"head_dim 96 has no Mosaic GPU kernel \(64, 128, 256\)",
        ),
        (
            bfloat16(1, 1, 2, 64),
            bfloat16(1, 2, 16, 2, 4, 64),
            r"page_size 4 has no Mosaic GPU kernel \(8, 16, 32, 64\)",
        ),
        (bfloat16(1, 9, 16, 64), bfloat16(1, 2, 4, 2, 16, 64), r"9 slots x 8 heads .* more than the 64 rows"),
        (
            jnp.zeros((1, 1, 2, 64)),
            jnp.zeros((1, 2, 4, 2, 16, 64)),
            r"dtype float32 has no Mosaic GPU kernel \(bfloat16, float16\)",
        ),
        (jnp.zeros((1, 1, 2, 64)), bfloat16(1, 2, 4, 2, 16, 64), "q is float32 and pages are bfloat16"),
        (
            bfloat16(1, 1, 2, 256),
            pages_as(np.zeros((1, 1, 4, 2, 16, 256), np.float32), "float8_e4m3fn"),
            "head_dim 256 over pages in 8 bits does not fit .* takes 64 or 128",
        ),
        (
            jnp.zeros((1, 1, 2, 64), jnp.float16),
            pages_as(np.zeros((1, 2, 4, 2, 16, 64), np.float32), "int8"),
            "q is float16; over pages in 8 bits the Mosaic GPU kernel takes bfloat16",
        ),
    ],
)
def test_attention_refuses_what_it_does_not_support(q, pages, message):
    with pytest.raises(NotImplementedError, match=message):
        attention.dense_attention(q, pages, jnp.zeros(q.shape[:2], jnp.int32))


def test_selection_and_update_refuse_what_they_do_not_support():
    arguments = {"page_size": 16, "capacity": 4, "score": "bounds", "group_reduce": "mean", "sink_pages": 1}
    for pages, message in (
        (100, "100 pages are not a multiple of 8"),
        (70000, "70000 pages do not fit the shared memory"),
    ):
        statistics, one = Statistics(bfloat16(1, 2, pages, 2, 64)), jnp.ones(1, int)
        with pytest.raises(NotImplementedError, match=message):
            selection.select_pages(bfloat16(1, 2, 64), statistics, one, one, **arguments)
    with pytest.raises(NotImplementedError, match="33 tokens are more than the Mosaic GPU kernel's 32"):
        update.update_pages(
            bfloat16(1, 1, 4, 2, 16, 64),
            None,
            bfloat16(1, 33, 1, 64),
            bfloat16(1, 33, 1, 64),
            jnp.zeros(1, jnp.int32),
            jnp.ones((1, 33), bool),
        )


def test_the_kernel_helper_passes_references_on():
    """A Ref argument is changed in place."""

    def body(ref, out_ref):
        out_ref[0] = ref[0] + 1
        ref[0] = 7

    def go(x):
        ref = jax.new_ref(x)
        launch = kernel(
            body,
            name="in_place",
            out_type=[jax.ShapeDtypeStruct((1,), jnp.int32)],
            grid=(1,),
            grid_names=("block",),
            interpret=INTERPRET,
        )
        (out,) = launch(ref)
        return out, ref[...]

    out, changed = jax.jit(go)(jnp.array([3], jnp.int32))
    assert (int(out[0]), int(changed[0])) == (4, 7)
