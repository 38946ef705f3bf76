"""A router on Hopper GPUs: the experts of few tokens, each once, and the tokens' shares of them.

Blocks of one cluster have a part of the product's depth each; the first adds their sums up and chooses.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compaction import write_pages
from pallas_kernels.gpu import SHARED_MEMORY, TILE_ROWS, kernel, matrix, wait_for_kernels_before
from pallas_kernels.grid_barrier import BLOCK, cluster_barrier, cluster_of, meet_in_cluster

TILE = 64
MOST_BLOCKS = 8  # of a cluster
_LEAST = -(2**31)
_RESERVED = 16 * 1024  # bytes of shared memory for what is small
COLUMNS = (32, 64, 128, 256)
"""Of a product; there may be fewer experts."""


def check(width: int, experts: int) -> None:
    """Raises `NotImplementedError` for routers that the kernel does not take."""
    if experts > COLUMNS[-1]:
        raise NotImplementedError(f"{experts} experts have no Mosaic GPU kernel (up to {COLUMNS[-1]})")
    _, steps, columns = _cut(width, experts)
    size = 2 * steps * TILE * (TILE_ROWS + columns) + 4 * TILE_ROWS * columns + _RESERVED
    if size > SHARED_MEMORY:
        raise NotImplementedError(
            f"a router of {width} x {experts} has no Mosaic GPU kernel: it takes {size} bytes of a block's "
            f"shared memory, which are {SHARED_MEMORY}"
        )


def _cut(width: int, experts: int) -> tuple[int, int, int]:
    """Blocks, tiles of the depth in each, and columns."""
    tiles = width // TILE
    blocks = max(n for n in range(1, MOST_BLOCKS + 1) if tiles % n == 0)
    return blocks, tiles // blocks, next(columns for columns in COLUMNS if columns >= experts)


def choose_experts(
    h: Float[Array, "R M"],
    router: Float[Array, "M E"],
    bias: Float[Array, " E"] | None,
    valid: Bool[Array, " R"],
    *,
    capacity: int,
    per_token: int,
    normalized: bool,
    interpret: Any,
) -> tuple[Int[Array, " C"], Int[Array, "1"], Float[Array, "R more"], Int[Array, "1"]]:
    """Chooses as `reference.choose` does.

    Returns:
      The experts that any token chose, in ascending order; how many; each token's shares of all, in as
      many columns as the product has; and a zero, for blocks of the next launch to count themselves with.
    """
    rows, width = h.shape
    there = router.shape[1]
    blocks, steps, experts = _cut(width, there)
    if experts > there:
        router = jnp.pad(router, ((0, 0), (0, experts - there)))
        bias = None if bias is None else jnp.pad(bias, (0, experts - there))
    tile = min(experts, 128)
    by_row = plgpu.Layout.TILED(  # a row to a warp
        plgpu.Tiling(((4, tile), (tile // 32,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )

    def body(h_ref, router_ref, *refs):
        refs = list(refs)
        bias_ref = refs.pop(0) if bias is not None else None
        valid_ref, ids_ref, count_ref, shares_ref, zero_ref, sums_ref = refs[:6]
        h_smem, router_smem, sums_smem, used_smem, warps_smem, loaded, met = refs[6:]
        block = lax.axis_index(BLOCK)
        depths = [pl.ds((block * steps + step) * TILE, TILE) for step in range(steps)]
        for step, at in enumerate(depths):
            plgpu.copy_gmem_to_smem(router_ref.at[at], router_smem.at[step], loaded.at[step])
        wait_for_kernels_before(interpret)  # of which the router is not
        for step, at in enumerate(depths):
            plgpu.copy_gmem_to_smem(h_ref.at[:, at], h_smem.at[step, pl.ds(0, rows)], loaded.at[step])

        def multiply(acc):
            for step in range(steps):
                plgpu.barrier_wait(loaded.at[step])
                plgpu.wgmma(acc, h_smem.at[step], router_smem.at[step])
            return acc[...]

        sums_smem[...] = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, experts), jnp.float32))
        plgpu.commit_smem()
        sums_ref[block] = plgpu.load(sums_smem.at[pl.ds(0, rows)], layout=by_row, optimized=False)
        meet_in_cluster(met, interpret)

        @pl.when(block == 0)
        def _():
            logits = [plgpu.load(sums_ref.at[part], layout=by_row, optimized=False) for part in range(blocks)]
            logits = sum(logits[1:], logits[0])
            if bias is not None:
                added = plgpu.load(bias_ref, layout=by_row.reduce(0), optimized=False).astype(jnp.float32)
                logits = logits + lax.broadcast_in_dim(added, logits.shape, [1])
            counts = plgpu.load(valid_ref, layout=by_row.reduce(1), optimized=False)
            counts = lax.broadcast_in_dim(counts, logits.shape, [0])
            # Whole numbers in the order of the logits: a warp finds the largest in one instruction.
            order = _ordered(lax.bitcast_convert_type(logits, jnp.int32))
            column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=by_row)
            order = jnp.where((column < there) & (counts > 0), order, _LEAST)
            backwards = experts - column  # of equal ones the first has the largest of these

            def of_row(values):
                return lax.broadcast_in_dim(values, logits.shape, [0])

            left, top = order, None
            for _ in range(per_token):
                largest = of_row(left.max(axis=1))
                top = largest if top is None else top
                first = of_row(jnp.where(left == largest, backwards, 0).max(axis=1))
                left = jnp.where(backwards == first, _LEAST, left)
            taken = jnp.where(left == order, 0, 1)
            highest = lax.bitcast_convert_type(_ordered(top), jnp.float32)
            weights = jnp.exp(logits - highest)
            counted = taken > 0 if normalized else column < there
            total = of_row(jnp.where(counted, weights, 0.0).sum(axis=1))
            shares_ref[...] = jnp.where(taken > 0, weights / total, 0.0)
            used = taken.astype(jnp.float32).max(axis=0)
            used_smem[0] = used
            plgpu.commit_smem()
            number = jnp.sum(used).astype(jnp.int32)
            count_ref[0] = number
            zero_ref[0] = jnp.int32(0)
            limits = jnp.int32(0), jnp.int32(experts), jnp.int32(0), jnp.int32(capacity)
            threshold = jnp.float32(0.5), jnp.int32(0)
            write_pages(used_smem, warps_smem, ids_ref, *limits, *threshold, interpret=interpret)

    launch = kernel(
        body,
        name="choose_experts",
        waits=False,
        out_type=[
            jax.ShapeDtypeStruct((capacity,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((rows, experts), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((blocks, rows, experts), jnp.float32),
        ],
        **cluster_of(blocks),
        reduction_bytes=32 * experts,
        scratch=[
            matrix((steps, TILE_ROWS, TILE), h.dtype, beside=min(TILE, experts)),
            matrix((steps, TILE, experts), router.dtype),
            plgpu.SMEM((TILE_ROWS, experts), jnp.float32),
            plgpu.SMEM((1, experts), jnp.float32),
            plgpu.SMEM((4,), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            cluster_barrier(),
        ],
        interpret=interpret,
    )
    biases = [] if bias is None else [bias]
    ids, count, shares, zero, _ = launch(h, router, *biases, valid.astype(jnp.int32))
    return ids, count, shares, zero


def _ordered(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Whole numbers in the order of the numbers in floating point whose bits these are; and back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
