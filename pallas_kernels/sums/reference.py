"""The definition of the sum over devices, within `shard_map`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import HEADS


def add_sum(
    x: Float[Array, "R M"], part: Float[Array, "R M"], norm: Float[Array, " M"] | None, *, eps: float
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """See `pallas_kernels.sums.api.add_sum`."""
    total = lax.psum(part.astype(jnp.float32), HEADS)
    x = (x.astype(jnp.float32) + total).astype(x.dtype)
    if norm is None:
        return x, x
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x, (x32 * scale * norm.astype(jnp.float32)).astype(x.dtype)
