"""Mixtures of experts: the kernel in the interpreter against the reference, and what it refuses.

The reference is compared with a definition, token by token, in tests/models/test_experts.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mixture_of_experts
from pallas_kernels.experts import reference
from pallas_kernels.experts.gpu import kernels
from pallas_kernels.experts.gpu.router import choose_experts
from tests.pallas_kernels.equality import assert_close
from tests.pallas_kernels.gpu.test_kernels import run
from tests.pallas_kernels.inputs import bounded, random_experts, silu

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("sizes", "parts", "activation", "normalized", "valid", "dtype"),
    [
        ((3, 128, 128, 8, 2, False), 1, silu, True, [True, False, True], jnp.bfloat16),
        ((9, 64, 128, 32, 3, True), 2, bounded, False, [True] * 9, jnp.float16),
        ((1, 128, 64, 16, 2, False), 1, silu, True, [False], jnp.bfloat16),
    ],
)
def test_the_kernel_equals_the_reference(sizes, parts, activation, normalized, valid, dtype):
    """Experts fewer than columns, every way to cut tiles, and rows of which none counts."""
    valid = jnp.asarray(valid)
    arguments, read = random_experts(np.random.default_rng(0), *sizes, valid, dtype)
    options = {
        "per_token": sizes[4], "normalized": normalized, "parts": parts, "activation": activation
    }  # fmt: skip
    out, count = run(kernels.mixture_of_experts, *arguments, blocks=2, **options)
    expected = jax.jit(functools.partial(reference.mixture_of_experts, **options))(*arguments)
    assert_close(out, expected[0], 2e-2)
    assert not np.asarray(out)[~np.asarray(valid)].any()
    assert int(count) == int(expected[1]) == read


def test_experts_of_equal_logits_are_chosen_in_their_order():
    (h, router, *_, valid), _ = random_experts(
        np.random.default_rng(0), 2, 64, 64, 16, 3, False, jnp.array([True, True]), jnp.bfloat16
    )
    h = h.at[1].set(h[0])
    router = jnp.tile(router[:, :8], 2)
    shares, chosen = reference.choose(h, router, None, valid, 3, True)
    padded = jnp.pad(h, ((0, 6), (0, 0))), router, None, jnp.pad(valid, (0, 6))
    options = {"capacity": 6, "per_token": 3, "normalized": True}
    ids, count, got, zero = run(choose_experts, *padded, **options)
    assert int(zero[0]) == 0
    np.testing.assert_array_equal(ids[: int(count[0])], np.flatnonzero(np.asarray(chosen).any(0)))
    np.testing.assert_allclose(got[:2, :16], shares, atol=1e-3)
    assert not np.asarray(got)[2:].any() and not np.asarray(got)[:, 16:].any()


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "experts", "dtype", "message"),
    [
        (65, 64, 64, 4, jnp.bfloat16, "65 rows have no Mosaic GPU kernel"),
        (1, 96, 64, 4, jnp.bfloat16, "experts of 96 x 64 in 1 parts have no Mosaic GPU kernel"),
        (1, 64, 96, 4, jnp.bfloat16, "experts of 64 x 96 in 1 parts have no Mosaic GPU kernel"),
        (1, 64, 64, 4, jnp.float32, "dtype float32 has no Mosaic GPU kernel"),
        (1, 17024, 64, 4, jnp.bfloat16, r"experts of width 17024 have no Mosaic GPU kernel \(up to 16896\)"),
        (1, 64, 64, 257, jnp.bfloat16, r"257 experts have no Mosaic GPU kernel \(up to 256\)"),
        (1, 8192, 64, 256, jnp.bfloat16, "a router of 8192 x 256 has no Mosaic GPU kernel: it takes"),
    ],
)
def test_what_the_kernel_refuses(rows, width, hidden, experts, dtype, message):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = (
        shape(rows, width), shape(width, experts), shape(experts, width, 2 * hidden),
        shape(experts, hidden, width), None, None, None, jax.ShapeDtypeStruct((rows,), bool),
    )  # fmt: skip
    function = functools.partial(
        kernels.mixture_of_experts, per_token=2, normalized=True, parts=1, activation=silu
    )
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(function, *arguments)


def test_the_public_function_is_the_reference_on_a_cpu():
    arguments, read = random_experts(
        np.random.default_rng(0), 2, 8, 6, 5, 2, True, jnp.array([True, True]), jnp.float32
    )
    options = {"per_token": 2, "normalized": True, "parts": 1, "activation": silu}
    out, count = mixture_of_experts(*arguments, **options)
    assert out.shape == (2, 8) and int(count) == read
    np.testing.assert_array_equal(out, reference.mixture_of_experts(*arguments, **options)[0])
