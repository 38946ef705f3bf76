"""Mixtures of experts on Hopper GPUs, in two launches: the router, then all experts that it chose."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.experts.gpu import router as routing
from pallas_kernels.experts.gpu.stream import TILE, apply_chosen, tiles_beside
from pallas_kernels.gpu import DTYPES, num_multiprocessors
from pallas_kernels.operation import check_supported, operation

MOST_ROWS = 64


@operation
def mixture_of_experts(
    h: Float[Array, "R M"],
    router: Float[Array, "M E"],
    gate_up: Float[Array, "E M columns"],
    down: Float[Array, "E F M"],
    router_bias: Float[Array, " E"] | None,
    gate_up_bias: Float[Array, "E columns"] | None,
    down_bias: Float[Array, "E M"] | None,
    valid: Bool[Array, " R"],
    *,
    per_token: int,
    normalized: bool,
    parts: int,
    activation: Callable[[Array, Array], Array],
    blocks: int | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "R M"], Int[Array, ""]]:
    """See `api.mixture_of_experts`; `blocks` of threads, None: one for each multiprocessor."""
    rows, width = h.shape
    count, hidden, _ = down.shape
    blocks = blocks or num_multiprocessors()
    check_supported("Mosaic GPU", dtype=(gate_up.dtype, DTYPES))
    if {h.dtype, router.dtype, down.dtype} != {gate_up.dtype}:
        raise NotImplementedError(
            f"rows in {h.dtype}, a router in {router.dtype} and experts in {gate_up.dtype} and {down.dtype} "
            "have no Mosaic GPU kernel (one dtype)"
        )
    if width % TILE or hidden % (TILE * parts):
        raise NotImplementedError(
            f"experts of {width} x {hidden} in {parts} parts have no Mosaic GPU kernel (multiples of {TILE}, "
            "each part too)"
        )
    if width > (most := blocks * tiles_beside(width) * TILE):
        raise NotImplementedError(f"experts of width {width} have no Mosaic GPU kernel (up to {most})")
    if rows > MOST_ROWS:
        raise NotImplementedError(f"{rows} rows have no Mosaic GPU kernel (up to {MOST_ROWS})")
    routing.check(width, count)

    missing = -rows % 8
    h, valid = jnp.pad(h, ((0, missing), (0, 0))), jnp.pad(valid, (0, missing))
    ids, read, shares, zero = routing.choose_experts(
        h,
        router,
        router_bias,
        valid,
        capacity=min(rows * per_token, count),
        per_token=per_token,
        normalized=normalized,
        interpret=interpret,
    )
    sums = apply_chosen(
        h,
        gate_up,
        down,
        gate_up_bias,
        ids,
        read,
        shares,
        zero,
        parts=parts,
        activation=activation,
        blocks=blocks,
        interpret=interpret,
    )
    out = sum(sums[1:], sums[0])
    if down_bias is not None:
        shares = shares[:, :count]
        out += shares @ jnp.where(jnp.any(shares > 0, axis=0)[:, None], down_bias.astype(jnp.float32), 0.0)
    return out[:rows], read[0]
