"""Keys and values in 8 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import CODES, QuantizedPages, quantize


@pytest.mark.parametrize(("dtype", "half_step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4)])
def test_numbers_come_back_to_half_a_step(dtype, half_step):
    tokens = np.random.default_rng(0).normal(size=(1, 2, 3, 2, 4, 16)).astype(np.float32)
    tokens *= 10.0 ** np.arange(-2, 2)[:, None]  # tokens of very different size: each has its own scale
    codes, scales = quantize(jnp.asarray(tokens), dtype)
    back = np.asarray(QuantizedPages(codes, scales).at(jnp.dtype("float32")))
    assert codes.dtype == dtype
    largest = np.abs(tokens).max(-1, keepdims=True)
    # An integer's step is that of the largest number; a float's is of the number itself, down to subnormals.
    size = largest if dtype == "int8" else np.maximum(np.abs(tokens), largest / 448 * 2**-6)
    assert (np.abs(back - tokens) <= size * half_step * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", CODES)
def test_zeros_stay_zeros(dtype):
    codes, scales = quantize(jnp.zeros((3, 8)), dtype)
    assert not np.asarray(scales).any()
    assert not np.asarray(codes.astype(jnp.float32)).any()
