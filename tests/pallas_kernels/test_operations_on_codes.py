"""Every operation on pages in 8 bits is that on the numbers that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import CODES, QuantizedPages, dequantized, quantize
from pallas_kernels.pages import check_pages
from tests.pallas_kernels.inputs import PAGES, random_retro_inputs, random_update

LENGTHS, WINDOW, GROUP, SIZE, DIM = (37, 6, 1), 3, 2, 4, 8


def codes_of(pages, dtype):
    """Pages in 8 bits; where there was NaN, the scale is."""
    return QuantizedPages(*quantize(jnp.asarray(pages), dtype))


def retro(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    return pallas_kernels.retro_attention(q, pages, page_ids, counts, last_loaded, positions, o, lse)


def dense(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    return pallas_kernels.dense_attention(q, pages, positions)


def some_pages(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    return pallas_kernels.attend_pages(q, pages, positions, last_loaded > 0)


def mass(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    return pallas_kernels.attention_mass(q, pages, positions, last_loaded > 0, group_reduce="mean")


def mass_of_selected(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    of = page_ids, counts, positions[:, -1]
    return pallas_kernels.selected_mass(q[:, -1], pages, *of, group_reduce="max")


def block_values(q, pages, page_ids, counts, last_loaded, positions, o, lse):
    blocks = jnp.zeros((*pages.shape[:2], PAGES // 2, pages.shape[-1]))
    first, settled = positions[:, 0], positions[:, -1]
    return pallas_kernels.settle_blocks(blocks, pages, first - 20, settled, block_pages=2, count=6)


@pytest.mark.parametrize("operation", [retro, dense, some_pages, mass, mass_of_selected, block_values])
@pytest.mark.parametrize("dtype", CODES)
def test_what_is_read_is_code_times_scale(operation, dtype):
    q, pages, *others = map(
        jnp.asarray, random_retro_inputs(np.random.default_rng(0), LENGTHS, WINDOW, GROUP, SIZE)
    )
    pages = codes_of(pages, dtype)
    got = operation(q, pages, *others)
    want = operation(q, dequantized(pages), *others)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    exact = dequantized(codes_of(pages.at("float32") * 1.5, dtype))  # another cache gives something else
    assert not np.array_equal(jax.tree.leaves(operation(q, exact, *others))[0], jax.tree.leaves(got)[0])


@pytest.mark.parametrize("statistics", ["min_max", "mean_key", "mean_key_int8", None])
@pytest.mark.parametrize("dtype", CODES)
def test_an_update_writes_its_rows_only_and_describes_keys_as_they_are_read(statistics, dtype):
    arguments = random_update(np.random.default_rng(1), LENGTHS, 5, SIZE, 2, DIM, statistics, "float32")
    before, kept, k, v, start, write = arguments
    before = codes_of(before, dtype)
    pages, fresh = pallas_kernels.update_pages(before, kept, k, v, start, write)

    page, offset = np.divmod(np.arange(PAGES * SIZE), SIZE)
    for b, length in enumerate(LENGTHS):
        written = np.arange(max(length - 5, 0), length)
        there = page[written], offset[written]
        for part, tokens in enumerate((k, v)):
            codes, scales = quantize(tokens[b, written - int(start[b])].swapaxes(0, 1), dtype)
            np.testing.assert_array_equal(pages.codes[b][:, there[0], part, there[1]], codes)
            np.testing.assert_array_equal(pages.scales[b][:, there[0], part, there[1]], scales)
        others = np.setdiff1d(np.arange(PAGES * SIZE), written)
        for got, was in zip(jax.tree.leaves(pages), jax.tree.leaves(before), strict=True):
            at = np.s_[:, page[others], :, offset[others]]
            bits = (np.asarray(array[b])[at].view(np.uint8) for array in (got, was))  # NaN equals NaN
            np.testing.assert_array_equal(*bits)
    if statistics:
        want = pallas_kernels.refresh_statistics(kept, dequantized(pages), start, write)
        jax.tree.map(np.testing.assert_array_equal, fresh, want)
        assert fresh.values.dtype == kept.values.dtype
    else:
        assert fresh is None


def test_statistics_of_a_half_precision_model_keep_their_dtype():
    arguments = random_update(np.random.default_rng(1), LENGTHS, 5, SIZE, 2, DIM, "mean_key", "bfloat16")
    pages, fresh = pallas_kernels.update_pages(codes_of(arguments[0], "int8"), *arguments[1:])
    assert (pages.dtype, pages.scales.dtype, fresh.values.dtype) == ("int8", "float32", "bfloat16")


@pytest.mark.parametrize("dtype", CODES)
def test_a_token_that_is_not_finite_stays_so(dtype):
    tokens = jnp.ones((2, DIM)).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    back = np.asarray(QuantizedPages(*quantize(tokens, dtype)).at("float32"))
    assert not np.isfinite(back[:, 1:3]).all(axis=1).any()


def test_what_are_no_pages_is_refused():
    pages = jnp.zeros((1, 1, 1, 2, 4, 8))
    codes = codes_of(pages, "int8")
    with pytest.raises(TypeError, match=r"pages are int8; give floating-point .* scales as QuantizedPages"):
        check_pages(codes.codes)
    with pytest.raises(TypeError, match=r"pages are float8_e4m3fn; give"):
        check_pages(pages.astype("float8_e4m3fn"))
    with pytest.raises(TypeError, match=r"float32 codes and float32 scales; use codes in int8 or float8"):
        check_pages(codes.replace(codes=pages))
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 2, 4, 8\) and scales \(1, 1, 1, 2\); give one scale"):
        check_pages(codes.replace(scales=codes.scales[..., 0]))


@pytest.mark.parametrize(("dtype", "half_step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4)])
def test_attention_errs_no_more_than_rounded_keys_and_values_can_make_it(dtype, half_step):
    """Scores err by e at most, weights so by a factor within exp(2e), and their values by half a step."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in [(4, DIM), (20, DIM), (20, DIM)])
    pages = np.stack([k, v]).reshape(2, 5, SIZE, DIM).swapaxes(0, 1)[None, None]
    arguments = jnp.asarray(q)[None, :, None], jnp.full((1, 4), 19)
    exact, got = (
        np.asarray(pallas_kernels.dense_attention(arguments[0], cache, arguments[1]))[0, :, 0]
        for cache in (jnp.asarray(pages), codes_of(pages, dtype))
    )
    largest_k, largest_v = np.abs(k).max(-1), np.abs(v).max(-1)
    e = np.abs(q).sum(-1) * largest_k.max() * half_step / np.sqrt(DIM)
    bound = np.expm1(2 * e) * largest_v.max() + largest_v.max() * half_step
    error = np.abs(got - exact).max(-1)
    assert (error > 0).all() and (error <= bound).all()
