"""What `on_device` checks of operations on rows of hidden states: their sizes, inputs and errors."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.experts import reference as experts_reference
from pallas_kernels.experts.gpu import kernels as experts_gpu
from pallas_kernels.sums import reference as sums_reference
from pallas_kernels.sums.gpu import parts as sums_gpu
from tests.pallas_kernels.equality import relative
from tests.pallas_kernels.inputs import bounded, random_experts, random_parts, silu


class Experts:
    """Mixtures of experts, of which some rows do not count."""

    def __init__(self, rows, width, hidden, experts, per_token, biased, dtype):
        sizes = f"R={rows} {width} x {hidden} E={experts} k={per_token}"
        self.name = f"mixture_of_experts {sizes}{' biased' * biased} {jnp.dtype(dtype).name}"
        self.sizes, self.dtype = (rows, width, hidden, experts, per_token, biased), dtype
        options = {
            "per_token": per_token,
            "normalized": not biased,
            "parts": 1,
            "activation": bounded if biased else silu,
        }
        self.kernel, self.reference = (
            jax.jit(functools.partial(module.mixture_of_experts, **options))
            for module in (experts_gpu, experts_reference)
        )

    def inputs(self, rng):
        valid = rng.random(self.sizes[0]) < 0.8
        valid[0] = True
        return random_experts(rng, *self.sizes, valid, self.dtype)[0]

    def errors(self, inputs, got, expected):
        return relative(got[0], expected[0]), int(got[1]) == int(expected[1])


class Parts:
    """Sums of parts that go to the residual stream."""

    def __init__(self, batch, tokens, width, parts, post_norm, norm, dtype):
        sizes, norms = f"B={batch} T={tokens} {width} S={parts}", " post" * post_norm + " norm" * norm
        self.name = f"add_parts {sizes}{norms} {jnp.dtype(dtype).name}"
        self.sizes, self.dtype = (batch, tokens, width, parts, post_norm, norm), dtype
        options = {"eps": 1e-5, "multiplier": 0.22 if post_norm else 1.0}
        self.kernel, self.reference = (
            jax.jit(functools.partial(module.add_parts, **options)) for module in (sums_gpu, sums_reference)
        )

    def inputs(self, rng):
        return random_parts(rng, *self.sizes, self.dtype)

    def errors(self, inputs, got, expected):
        return max(map(relative, got, expected)), True
