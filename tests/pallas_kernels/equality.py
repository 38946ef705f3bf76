"""When a kernel's result equals its reference's; what kernels exist for is read from the registries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import IMPLEMENTATIONS, SCORES, STATISTICS, dequantized
from pallas_kernels.selection import reference as selection
from pallas_kernels.update import reference as update
from tests.pallas_kernels.page_sets import ROUNDING, largest_distance

KERNELS = [name for name in IMPLEMENTATIONS if name != "xla"]
FUSED = {
    kernels: [kind for kind, statistic in STATISTICS.items() if statistic.fused_by(kernels)]
    for kernels in KERNELS
}
"""Statistics that kernels compute."""
SCORED = {
    kernels: [
        (score, kind)
        for score, known in SCORES.items()
        for kind in known.statistics
        if kind in FUSED[kernels] and known.coefficients is not None
    ]
    for kernels in KERNELS
}
"""Scores that kernels know, and what each reads."""


def assert_close(got, expected, tolerance):
    """Minus infinity at the same places, and elsewhere the same to a relative `tolerance` in all."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert np.isfinite(got[finite]).all()
    error = np.linalg.norm(got[finite] - expected[finite]) / max(np.linalg.norm(expected[finite]), 1e-9)
    assert error < tolerance


def assert_same_update(got, inputs):
    """The pages alike; statistics too, but for an ulp of their dtype where they are sums in another order.

    In 8 bits that is an ulp of a float32 sum, by which a number halfway between two steps may take the other.
    """
    expected = jax.jit(update.update_pages)(*inputs)
    assert jax.tree.structure(got[0]) == jax.tree.structure(expected[0])
    for pages, wanted in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_array_equal(*(np.asarray(array, np.float32) for array in (pages, wanted)))
    if inputs[1] is None:
        assert got[1] is None
        return
    statistic = STATISTICS[inputs[1].kind]
    sums = any(part.fold.finish for part in statistic.parts)
    tolerance = float(jnp.finfo(inputs[2].dtype).eps) if sums else 0
    assert got[1].kind == inputs[1].kind
    if statistic.quantized:
        np.testing.assert_allclose(got[1].scales, expected[1].scales, rtol=1e-6)
        steps = np.abs(np.subtract(*(np.asarray(result[1].values, int) for result in (got, expected))))
        assert steps.max() <= 1 and np.mean(steps > 0) < 1e-3
        return
    fresh = [np.asarray(result[1].values, np.float32) for result in (got, expected)]
    np.testing.assert_allclose(*fresh, rtol=tolerance, atol=tolerance)


def assert_same_heads(got, inputs, options):
    """Queries, and what is written of a product, to a few roundings; pages that are not keep every bit."""
    expected = jax.jit(functools.partial(update.update_from_product, **options))(*inputs)
    tolerance = 4 / 127 if inputs[0].dtype.itemsize == 1 else 2 * float(jnp.finfo(options["dtype"]).eps)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(expected)]
    assert_close(got[0], expected[0], 2 * float(jnp.finfo(options["dtype"]).eps))
    pages, wanted, before = (np.asarray(dequantized(x), np.float32) for x in (got[1], expected[1], inputs[0]))
    same = ((wanted == before) | (np.isnan(wanted) & np.isnan(before))).all(axis=-1)
    np.testing.assert_array_equal(pages[same], wanted[same])
    assert_close(pages[~same], wanted[~same], tolerance)
    if inputs[1] is not None:
        assert_close(*(result[2].at_float32() for result in (got, expected)), tolerance)


def assert_same_selection(got, inputs, *, rounding=ROUNDING, **arguments):
    """The same pages, but for those within `rounding` of the last one chosen."""
    expected = jax.jit(functools.partial(selection.select_pages, **arguments))(*inputs)
    assert got[0].shape == expected[0].shape
    arguments.pop("capacity")
    assert largest_distance(got, expected, *inputs[:3], **arguments) <= rounding


def relative(got, expected):
    """Relative error over what is finite; infinite where the infinities or a NaN differ."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    if not (
        np.array_equal(got[~finite], expected[~finite], equal_nan=True) and np.isfinite(got[finite]).all()
    ):
        return np.inf
    return np.linalg.norm(got[finite] - expected[finite]) / max(np.linalg.norm(expected[finite]), 1e-9)
