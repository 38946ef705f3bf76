"""The definitions of sums: of parts on one device, and over devices, within `shard_map`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import HEADS


def add_parts(
    x: Float[Array, "B T M"],
    parts: Float[Array, "S B rows M"],
    post_norm: Float[Array, " M"] | None,
    norm: Float[Array, " M"] | None,
    *,
    eps: float,
    multiplier: float,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """See `pallas_kernels.sums.api.add_parts`."""
    branch = jnp.sum(parts[:, :, : x.shape[1]].astype(jnp.float32), axis=0).astype(x.dtype)
    branch = _normed(branch, post_norm, eps)
    if multiplier != 1:
        branch = branch * multiplier
    x = x + branch
    return x, _normed(x, norm, eps)


def add_sum(
    x: Float[Array, "R M"], part: Float[Array, "R M"], norm: Float[Array, " M"] | None, *, eps: float
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """See `pallas_kernels.sums.api.add_sum`."""
    total = lax.psum(part.astype(jnp.float32), HEADS)
    x = (x.astype(jnp.float32) + total).astype(x.dtype)
    return x, _normed(x, norm, eps)


def _normed(x: Float[Array, "... M"], weight: Float[Array, " M"] | None, eps: float) -> Float[Array, "... M"]:
    if weight is None:
        return x
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)
