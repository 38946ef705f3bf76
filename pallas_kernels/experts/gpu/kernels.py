"""Products with chosen matrices on Hopper GPUs.

One thread block multiplies some columns of one matrix. Few rows make a product that is bound by reading the
matrix, so it is the matrix whose columns fill the 64 rows of a wgmma, and the rows are its columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import DTYPES, kernel, matrix
from pallas_kernels.operation import check_supported, operation

DEPTH = 64
"""Rows of a matrix that are copied at once."""
STAGES = 6
"""Copies that are on their way or in use: so two thread blocks fit on a multiprocessor."""
MOST_ROWS = 64


@operation
def chosen_products(
    x: Float[Array, "X T K"],
    matrices: Float[Array, "E K N"],
    ids: Int[Array, " C"],
    *,
    dtype: Any,
    interpret: Any = None,
) -> Float[Array, "C T N"]:
    """See `api.chosen_products`."""
    _, depth, width = matrices.shape
    check_supported("Mosaic GPU", dtype=(matrices.dtype, DTYPES))
    if x.dtype != matrices.dtype:
        raise NotImplementedError(
            f"rows in {x.dtype} and matrices in {matrices.dtype} have no Mosaic GPU kernel"
        )
    if depth % DEPTH or width % 64:
        raise NotImplementedError(
            f"matrices of {depth} x {width} have no Mosaic GPU kernel (multiples of {DEPTH} x 64)"
        )
    if x.shape[1] > MOST_ROWS:
        raise NotImplementedError(f"{x.shape[1]} rows have no Mosaic GPU kernel (up to {MOST_ROWS})")
    columns = 128 if width % 128 == 0 else 64
    rows = -(-x.shape[1] // 8) * 8
    steps, shared = depth // DEPTH, x.shape[0] == 1
    stages = min(STAGES, steps + 1)  # one of them is free while another is in use

    def body(ids_ref, x_ref, matrices_ref, out_ref, x_smem, matrix_smem, out_smem, loaded):
        product, part = lax.axis_index("product"), lax.axis_index("part")
        chosen, own = ids_ref[product], pl.ds(part * columns, columns)

        @pl.when(chosen >= 0)
        def _():
            def load(step):
                place, at = lax.rem(step, stages), pl.ds(step * DEPTH, DEPTH)
                ready = loaded.at[place]
                source = x_ref.at[0 if shared else product, :, at]
                plgpu.copy_gmem_to_smem(source, x_smem.at[place], ready)
                plgpu.copy_gmem_to_smem(matrices_ref.at[chosen, at, own], matrix_smem.at[place], ready)

            for step in range(stages - 1):
                load(jnp.int32(step))

            def multiply(acc):
                def add(step, _):
                    place, ahead = lax.rem(step, stages), step + stages - 1
                    plgpu.barrier_wait(loaded.at[place])
                    plgpu.wgmma(
                        acc, matrix_smem.at[place].transpose((1, 0)), x_smem.at[place].transpose((1, 0))
                    )
                    plgpu.wgmma_wait(1)  # what the product before this one has read can be overwritten

                    @pl.when(ahead < steps)
                    def _():
                        load(ahead)

                lax.fori_loop(0, steps, add, None)
                return acc[...]

            out_smem[...] = pl.run_scoped(multiply, plgpu.ACC((columns, rows), jnp.float32)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref.at[product, own])
            plgpu.wait_smem_to_gmem(0)

    launch = kernel(
        body,
        name="chosen_products",
        out_type=[jax.ShapeDtypeStruct((ids.shape[0], width, rows), dtype)],
        grid=(width // columns, ids.shape[0]),
        grid_names=("part", "product"),
        scratch=[
            matrix((stages, rows, DEPTH), x.dtype),
            matrix((stages, DEPTH, columns), matrices.dtype),
            plgpu.SMEM((columns, rows), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        interpret=interpret,
    )
    padded = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))
    (out,) = launch(ids.astype(jnp.int32), padded, matrices)
    return out.swapaxes(1, 2)[:, : x.shape[1]]
