"""Barriers for the thread blocks of a Hopper kernel: of a cluster, or all, which must fit on the GPU at once.

All blocks count themselves in device memory. The interpreter runs only blocks of a cluster side by side, so
there they are one cluster, and its barrier, in which races are found, takes the counter's place.
"""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = "block"
"""The axis of blocks that meet."""


def grid_of(blocks: int, interpret: Any) -> dict[str, Sequence]:
    """The grid of a kernel all of whose blocks meet, as arguments of `gpu.kernel`."""
    return {"grid": (blocks,), "grid_names": (BLOCK,)} if interpret is None else cluster_of(blocks)


def cluster_of(blocks: int) -> dict[str, Sequence]:
    """The same for one cluster."""
    return {"grid": (1,), "grid_names": ("cluster",), "cluster": (blocks,), "cluster_names": (BLOCK,)}


def cluster_barrier() -> Any:
    """What of scratch `meet_in_cluster` needs, and in the interpreter `meet`."""
    return plgpu.ClusterBarrier(collective_axes=(BLOCK,))


def meet_in_cluster(barrier: Any, interpret: Any) -> None:
    """Waits until every block of the cluster has come here; what each wrote before, all can read after."""
    if interpret is None:  # by themselves, barriers in shared memory order what happens within a block
        _fence()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    if interpret is None:
        _fence()


def meet(counter_ref: Any, blocks: int) -> None:
    """Waits until every block has come here; what each wrote before, all can read after, copies (TMA) too.

    Args:
      counter_ref: int32[1], 0 before the first comes.
      blocks: how many.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(_, counter):
        semaphore = mgpu.SemaphoreRef(mgpu.memref_ptr(counter))
        mgpu.inline_ptx("fence.proxy.async.global;", has_side_effects=True)
        mgpu.warpgroup_barrier()
        semaphore.signal(1, memory_scope="gpu")
        semaphore.wait(blocks, decrement=False, memory_scope="gpu")
        mgpu.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    count(counter_ref)


def _fence():
    @plgpu.inline_mgpu()
    def fence(_):
        mgpu.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)

    fence()
