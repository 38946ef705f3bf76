"""Products with chosen matrices: the definition, and the Hopper kernel in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chosen_products
from pallas_kernels.experts.gpu import kernels
from tests.pallas_kernels.gpu.test_kernels import run


def inputs(products: int, rows: int, depth: int, width: int, dtype):
    """Two products of three are asked for, with matrices of five whose others are NaN."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((products, rows, depth)), dtype)
    matrices = np.full((5, depth, width), np.nan, np.float32)
    matrices[[4, 1]] = rng.standard_normal((2, depth, width)) * depth**-0.5
    return x, jnp.asarray(matrices, dtype), jnp.array([4, -1, 1])


def expected(x, matrices, ids):
    rows = np.broadcast_to(np.asarray(x, np.float32), (3, *x.shape[1:]))
    return [rows[c] @ np.asarray(matrices[ids[c]], np.float32) for c in (0, 2)]


@pytest.mark.parametrize("products", [1, 3])
def test_products_are_those_of_each_matrix(products):
    arguments = inputs(products, 2, 8, 6, jnp.float32)
    y = chosen_products(*arguments, dtype=jnp.float32)
    np.testing.assert_allclose(y[::2], expected(*arguments), atol=1e-5)


@pytest.mark.parametrize(
    ("products", "rows", "depth", "width", "dtype"),
    [(1, 3, 64, 64, jnp.bfloat16), (3, 9, 512, 128, jnp.float16)],
)
def test_the_kernel_equals_the_definition(products, rows, depth, width, dtype):
    arguments = inputs(products, rows, depth, width, dtype)
    y = run(kernels.chosen_products, *arguments, dtype=jnp.float32)
    assert y.shape == (3, rows, width)
    np.testing.assert_allclose(y[::2], expected(*arguments), atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 65, 64, 64, jnp.bfloat16), "65 rows have no Mosaic GPU kernel"),
        ((1, 1, 96, 64, jnp.bfloat16), "matrices of 96 x 64 have no Mosaic GPU kernel"),
        ((1, 1, 64, 64, jnp.float32), "dtype float32 has no Mosaic GPU kernel"),
    ],
)
def test_what_the_kernel_refuses(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        kernels.chosen_products(*inputs(*sizes), dtype=jnp.float32)


def test_rows_of_another_number_of_products_are_refused():
    x, *others = inputs(2, 1, 4, 4, jnp.float32)
    with pytest.raises(ValueError, match="x has rows for 2 products; give those of all in one, or 3"):
        chosen_products(x, *others, dtype=jnp.float32)
    assert jax.eval_shape(lambda: chosen_products(x[:1], *others, dtype=jnp.bfloat16)).shape == (3, 1, 4)
