"""What the Mosaic GPU kernels share: how they are launched, layouts, and what they support.

Hopper only (H100, H200): they use its tensor memory accelerator (TMA) and its warpgroup matrix instructions
(wgmma).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import traced_for
from pallas_kernels.operation import before_launch, check_supported

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (8, 16, 32, 64)
TILE_ROWS = 64
"""Rows of a wgmma: the window's slots times the heads of a group fit into them."""
SHARED_MEMORY = 227 * 1024
"""Bytes that one block of an H100 or H200 may use."""
LOG2E = math.log2(math.e)


def check_support(dtype: Any, head_dim: int, page_size: int, head_dims: Sequence[int] = HEAD_DIMS) -> None:
    """Raises `NotImplementedError` for what no kernel here supports."""
    check_supported(
        "Mosaic GPU",
        dtype=(dtype, DTYPES),
        head_dim=(head_dim, tuple(head_dims)),
        page_size=(page_size, PAGE_SIZES),
    )


def num_multiprocessors() -> int:
    """Streaming multiprocessors of the device that will run the kernel; an H100's where there is none."""
    device = traced_for()
    if device.platform != "gpu":  # the interpreter
        return 132
    return getattr(device, "core_count", None) or getattr(device, "num_cores", None) or 132


def chip() -> str:
    """The name of the chip that tuned sizes go by; an H100 where there is none."""
    kind = traced_for().device_kind
    return next((name for name in ("H100", "H200") if name in kind), "H100")


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Sequence[jax.ShapeDtypeStruct],
    grid: Sequence[int],
    grid_names: Sequence[str],
    scratch: Sequence[Any] = (),
    warpgroups: int = 1,
    waits: bool = True,
    cluster: Sequence[int] = (),
    cluster_names: Sequence[str] = (),
    reduction_bytes: int = 2048,
    interpret: Any = None,
) -> Callable[..., Any]:
    """A kernel whose arguments may be Refs, which it then changes in place.

    Kernels of one decode step follow each other closely, so each lets the next one start early (programmatic
    dependent launch): its blocks are set up while this one still runs, and wait before they touch memory.

    Args:
      body: takes argument references, output references, then scratch references. Axis "warpgroup" tells
        its warpgroups apart where there are several.
      name: of the kernel, in profiles.
      out_type: shapes of the outputs.
      grid: blocks.
      grid_names: a name for each axis of the grid.
      scratch: shared memory and barriers.
      warpgroups: of 128 threads each.
      waits: for the kernels before it to end. False: the body does, by `wait_for_kernels_before`, and until
        then touches nothing that they write.
      cluster: blocks that run side by side, for each of the grid.
      cluster_names: a name for each axis of the cluster.
      reduction_bytes: of shared memory for reductions over several warps: 16 for each result in 32 bits.
      interpret: `InterpretGPUParams` to run it in the interpreter.
    """
    before_launch()
    thread_name = "warpgroup" if warpgroups > 1 else None

    def scoped(*refs):
        if waits:
            wait_for_kernels_before(interpret)
        pl.run_scoped(
            lambda *scratch_refs: body(*refs, *scratch_refs), *scratch, collective_axes=thread_name or ()
        )

    return pl.kernel(
        scoped,
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(
            grid=tuple(grid),
            grid_names=tuple(grid_names),
            cluster=tuple(cluster),
            cluster_names=tuple(cluster_names),
            num_threads=warpgroups if warpgroups > 1 else None,
            thread_name=thread_name,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=reduction_bytes),
        interpret=interpret if interpret is not None else False,
        name=name,
    )


def wait_for_kernels_before(interpret: Any) -> None:
    """Waits for what they write, and lets the kernel after this one be set up."""
    if interpret is None:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()


def matrix(shape: Sequence[int], dtype: Any, beside: int | None = None) -> Any:
    """Shared memory for an operand of wgmma, (..., rows, columns), in the layout that it wants.

    Both of its operands want the same: `beside` is the columns of the other, where those are fewer.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row = min(128, (beside or shape[-1]) * itemsize)  # bytes
    transforms = (plgpu.TilingTransform((8, row // itemsize)), plgpu.SwizzleTransform(row))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def row_layout(columns: int) -> Any:
    """The layout of a vector of head_dim elements over the 128 threads of a warpgroup.

    64 elements lie twice in a warpgroup, since it has more threads than that.
    """
    vector = max(columns // 128, 1)
    lanes = columns // 4 // vector
    lane_dims = (-2,) if lanes == 32 else (-2, plgpu.Replicated(32 // lanes))
    return plgpu.Layout.TILED(
        plgpu.Tiling(((columns,), (columns // 4,), (vector,))),
        warp_dims=(-3,),
        lane_dims=lane_dims,
        vector_dim=-1,
    )
