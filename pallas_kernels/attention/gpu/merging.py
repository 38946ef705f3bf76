"""Joins the splits of a query's pages, and what the query had attended to before, on Hopper GPUs.

One launch, which also moves the output cache on where one is given as Refs. A block of threads then has all
slots of a head, whose outputs it writes into the cache when it has read what was there: each moves to the
place of the slot before it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.gpu.thread_block import LOWEST
from pallas_kernels.gpu import LOG2E, kernel, row_layout

WARPGROUPS = 4
"""Slots that a block joins at a time."""


def merge_splits(
    o: Float[Array, "B K splits R8 D"],
    lse: Float[Array, "B K splits 64"],
    cached: tuple[Any, Any] | None,
    active: Bool[Array, " B"] | None,
    shape: Sequence[int],
    dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"]]:
    """Joins the splits of each query, and its cached output.

    Args:
      o: attention over each split; rows are slots times the heads of a group.
      lse: their base-2 log-sum-exp.
      cached: outputs of the older slots so far, float32, [B, W - 1, N, D], and their log-sum-exp,
        [B, W - 1, N]; Refs where they are to be moved on. None without any.
      active: sequences whose cache is moved on; None: no cache is.
      shape: of the queries, (B, W, N, D).
      dtype: of the outputs.
      interpret: see `pallas_kernels.gpu.kernel`.

    Returns:
      Outputs in `dtype`, and their log-sum-exp in float32.
    """
    B, W, N, D = shape
    K, splits = o.shape[1:3]
    group, move = N // K, active is not None
    warpgroups = min(W, WARPGROUPS) if move else 1
    layout = row_layout(D)

    def vector(ref, *index):
        return plgpu.load(ref.at[index], layout=layout, optimized=False)

    def body(o_ref, lse_ref, *refs):
        if cached is not None:
            cached_o_ref, cached_lse_ref, *refs = refs
        if move:
            active_ref, *refs = refs
        merged_ref, merged_lse_ref, *refs = refs
        b, n = lax.axis_index("sequence"), lax.axis_index("head")
        head = lax.div(n, jnp.int32(group))

        def joined(slot):
            row = slot * group + lax.rem(n, jnp.int32(group))
            parts = [lse_ref[b, head, split, row] for split in range(splits)]
            outputs = [vector(o_ref, b, head, split, row) for split in range(splits)]
            if cached is not None:
                older = jnp.minimum(slot, W - 2)
                parts.append(jnp.where(slot < W - 1, cached_lse_ref[b, older, n] * LOG2E, -jnp.inf))
                outputs.append(vector(cached_o_ref, b, older, n))
            highest = functools.reduce(jnp.maximum, parts, jnp.float32(LOWEST))
            weights = [jnp.exp2(part - highest) for part in parts]
            norm = functools.reduce(jnp.add, weights)
            seen = norm > 0
            inverse = jnp.where(seen, 1 / norm, 0.0)
            merged = functools.reduce(
                jnp.add,
                [output * (weight * inverse) for output, weight in zip(outputs, weights, strict=True)],
            )
            return merged, jnp.where(seen, (highest + jnp.log2(norm)) / LOG2E, -jnp.inf)

        def write(slot, merged, total):
            merged_ref[b, slot, n] = merged.astype(dtype)
            merged_lse_ref[b, slot, n] = total

        if not move:
            slot = lax.axis_index("slot")
            write(slot, *joined(slot))
            return
        (all_read,) = refs
        moves = active_ref[b]  # looked up first, or all would wait for it last
        slots = [lax.axis_index("warpgroup") + first for first in range(0, W, warpgroups)]
        found = [joined(jnp.minimum(slot, W - 1)) for slot in slots]
        plgpu.barrier_arrive(all_read)
        plgpu.barrier_wait(all_read)
        for slot, result in zip(slots, found, strict=True):

            @pl.when(slot < W)
            def _(slot=slot, result=result):
                write(slot, *result)

            @pl.when((slot > 0) & (slot < W) & moves)
            def _(slot=slot, result=result):
                cached_o_ref[b, slot - 1, n], cached_lse_ref[b, slot - 1, n] = result

    launch = kernel(
        body,
        name="merge",
        out_type=[
            jax.ShapeDtypeStruct((B, W, N, D), dtype),
            jax.ShapeDtypeStruct((B, W, N), jnp.float32),
        ],
        grid=(B, 1 if move else W, N),
        grid_names=("sequence", "slot", "head"),
        scratch=[plgpu.Barrier(num_arrivals=warpgroups)] if move else [],
        warpgroups=warpgroups,
        interpret=interpret,
    )
    return launch(o, lse, *(cached or ()), *([active] if move else []))
