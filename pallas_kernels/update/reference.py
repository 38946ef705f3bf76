"""Page update in plain `jnp`: the definition, and the path on the CPU."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.layout import KEYS
from pallas_kernels.statistics import STATISTICS


def update_pages(
    pages: Float[Array, "B K P 2 S D"],
    statistics: Float[Array, "B K P Z D"] | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    kind: str,
) -> tuple[Float[Array, "B K P 2 S D"], Float[Array, "B K P Z D"] | None]:
    """See `pallas_kernels.update.api.update_pages`."""
    B, T = write.shape
    P, _, S = pages.shape[2:5]
    sequence = jnp.arange(B)[:, None]
    position = start[:, None] + jnp.arange(T)
    page = jnp.where(write, position // S, P)  # P lies outside: dropped
    entry = jnp.stack([k, v], axis=3).astype(pages.dtype)
    pages = pages.at[sequence, :, page, :, position % S].set(entry, mode="drop")
    if statistics is None:
        return pages, None

    end = jnp.max(jnp.where(write, position + 1, 0), axis=1)[:, None]
    touched = start[:, None] // S + jnp.arange((T + S - 2) // S + 1)
    keys = pages[sequence, :, jnp.clip(touched, 0, P - 1), KEYS]  # [B, touched, K, S, D]
    valid = touched[..., None] * S + jnp.arange(S) < end[..., None]
    fresh = STATISTICS[kind].compute(keys, jnp.broadcast_to(valid[:, :, None], keys.shape[:-1]))
    touched = jnp.where((touched >= 0) & (touched * S < end), touched, P)
    return pages, statistics.at[sequence, :, touched].set(fresh, mode="drop")
