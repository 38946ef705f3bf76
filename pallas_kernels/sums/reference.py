"""The definitions of sums: of parts on one device, and over devices, within `shard_map`."""

from typing import Any

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
    branch = _normed(_sum(parts[:, :, : x.shape[1]], x.dtype), post_norm, eps)
    if multiplier != 1:
        branch = branch * multiplier
    x = x + branch
    return x, _normed(x, norm, eps)


def add_sum(
    x: Float[Array, "R M"], parts: Float[Array, "S rows M"], norm: Float[Array, " M"] | None, *, eps: float
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """See `pallas_kernels.sums.api.add_sum`."""
    total = lax.psum(_sum(parts[:, : x.shape[0]], x.dtype).astype(jnp.float32), HEADS)
    x = (x.astype(jnp.float32) + total).astype(x.dtype)
    return x, _normed(x, norm, eps)


def _sum(parts: Float[Array, "S ..."], dtype: Any) -> Float[Array, "..."]:
    return jnp.sum(parts.astype(jnp.float32), axis=0).astype(dtype)


def _normed(x: Float[Array, "... M"], weight: Float[Array, " M"] | None, eps: float) -> Float[Array, "... M"]:
    if weight is None:
        return x
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)
