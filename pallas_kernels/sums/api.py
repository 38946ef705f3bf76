"""Public functions of sums that go to the residual stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import HEADS, SEQUENCES, dispatch, kernels_of_device
from pallas_kernels.gpu import DTYPES
from pallas_kernels.sums import reference
from pallas_kernels.sums.gpu import kernels as mosaic_gpu
from pallas_kernels.sums.gpu import parts as mosaic_gpu_parts
from pallas_kernels.sums.gpu import peers

BY_DEVICE = P((SEQUENCES, HEADS))
SPLITS = 8
"""Parts of a product of few rows: as many as XLA makes on an H100, for most widths."""
MOST_SPLIT_ROWS = 64
"""Of more rows the parts themselves take too long to write and to read."""


def depth_splits(
    rows: int, depth: int, dtype: Any, implementation: str | None = None, *, whole_depth: bool = False
) -> int:
    """Into how many parts to cut the depth of a product (split-K) for the kernel that reads it to add up.

    Args:
      rows: of the product.
      depth: of it.
      dtype: of what is multiplied.
      implementation: of what adds the parts up.
      whole_depth: whether every device has the whole depth, if there are several.

    Returns:
      How many, which divides the depth; 1 where XLA adds up what it cuts by itself: without a kernel, of many
      rows, or where XLA partitions the depth among several devices.
    """
    kernels = implementation != "xla" and kernels_of_device() == "mosaic_gpu"
    mesh = jax.sharding.get_abstract_mesh()
    alone = whole_depth or mesh.size <= 1 or mesh.are_all_axes_manual
    few = rows <= MOST_SPLIT_ROWS and depth % (8 * SPLITS) == 0 and jnp.dtype(dtype) in DTYPES
    return SPLITS if kernels and alone and few else 1


def add_parts(
    x: Float[Array, "B T M"],
    parts: Float[Array, "S B rows M"],
    post_norm: Float[Array, " M"] | None,
    norm: Float[Array, " M"] | None,
    *,
    eps: float,
    multiplier: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """Adds the sum of some parts to the residual stream, and norms it.

    The sum, taken in float32, has the dtype of the stream, and so it has after its own norm and its
    multiplication. On TPUs XLA does that by itself.

    Args:
      x: the residual stream.
      parts: of what is added, in any dtype: one, or several of one product (see `depth_splits`). Rows of a
        sequence beyond its T are not read.
      post_norm: weight of a root-mean-square norm of their sum; None: no norm.
      norm: weight of that of the result; None: no norm.
      eps: of the norms.
      multiplier: of the sum, after its norm.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The residual stream, and its norm; without a norm the stream twice.

    Raises:
      ValueError: parts that are not of such a stream, or have fewer rows.
    """
    _check_parts(x, parts)
    if implementation in (None, "mosaic_tpu") and kernels_of_device() == "mosaic_tpu":
        implementation = "xla"
    sequences = P(SEQUENCES)
    return dispatch(
        "add_parts",
        implementation,
        {"xla": reference.add_parts, "mosaic_gpu": mosaic_gpu_parts.add_parts},
        ((sequences, P(None, SEQUENCES), P(), P()), (sequences, sequences)),
        x,
        parts,
        post_norm,
        norm,
        eps=eps,
        multiplier=multiplier,
    )


def _check_parts(x: Array, parts: Array) -> None:
    alike = parts.ndim == x.ndim + 1 and (*parts.shape[1:-2], parts.shape[-1]) == (*x.shape[:-2], x.shape[-1])
    if not alike or parts.shape[0] < 1 or parts.shape[-2] < x.shape[-2]:
        raise ValueError(
            f"parts of shape {parts.shape} do not add up to what a residual stream of shape {x.shape} takes; "
            "they need an axis of one part or more in front, and as many rows or more"
        )


class Mailbox(NamedTuple):
    """Where devices leave what they add, until it is read.

    Attributes:
      cells: a reference to an array that `add_sum` changes in place: on each device of the mesh, two turns of
        rows from each device that shares its sequences.
      addresses: where each of these devices has its cells. They come from all of them, so that none is
        written to before it is open.
    """

    cells: Any  # [devices, 2, R, senders, M]
    addresses: Int[Array, "devices senders 2"]


def open_mailbox(rows: int, width: int, dtype: Any) -> Mailbox | None:
    """A mailbox on each device of the mesh that is set, for the sums of one step.

    Args:
      rows: R, as many as any of the sums has on a device.
      width: M.
      dtype: of the residual stream.

    Returns:
      The mailbox; None where sums are XLA's: on one device, without a kernel for these, or where the devices
      cannot reach each other's memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shared = tuple(mesh.shape) == (SEQUENCES, HEADS) and mesh.shape[HEADS] > 1 and not mesh.manual_axes
    if not shared or kernels_of_device() != "mosaic_gpu" or not peers.reach_each_other():
        return None
    devices, dtype = mesh.shape[HEADS], jnp.dtype(dtype)
    if not mosaic_gpu.supported(rows, width, dtype, devices):
        return None

    def opened():
        cells, address = mosaic_gpu.open_cells(rows, width, dtype, devices)
        return cells, lax.all_gather(address[0], HEADS)[None]

    spread = jax.shard_map(opened, in_specs=(), out_specs=(BY_DEVICE, BY_DEVICE), check_vma=False)
    cells, addresses = spread()
    return Mailbox(jax.new_ref(cells), addresses)


def add_sum(
    x: Float[Array, "R M"],
    parts: Float[Array, "S rows M"],
    norm: Float[Array, " M"] | None,
    mailbox: Mailbox | None,
    *,
    eps: float,
    turn: int,
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """Adds the sum over all devices to the residual stream, and norms it; within `shard_map`.

    What a device adds is the sum of its own parts in the dtype of the stream. Those of all devices are summed
    in float32 in their order, so that all have the same result to the last bit.

    Args:
      x: the residual stream, the same on all devices of the mesh axis `HEADS`.
      parts: whose sum this device adds to it, see `add_parts`; rows beyond R are not read.
      norm: weight of a root-mean-square norm; None: no norm.
      mailbox: of `open_mailbox`, this device's part of it; None: XLA sums.
      eps: of the norm.
      turn: 0 or 1; another one than that of the sum before, unless devices have waited for each other since.

    Returns:
      The residual stream, and its norm; without a norm the stream twice.

    Raises:
      ValueError: parts that are not of such a stream, or have fewer rows.
    """
    _check_parts(x, parts)
    if mailbox is None:
        return reference.add_sum(x, parts, norm, eps=eps)
    cells, addresses = mailbox
    sender = lax.axis_index(HEADS)[None]
    sums = mosaic_gpu.add_sum(x, parts[None], norm, cells, addresses[0], sender, eps=eps, turn=turn)
    return sums[0][0], sums[1][0]
