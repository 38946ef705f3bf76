"""Sums over the memory of several Hopper GPUs of one process: a warpgroup for each row.

Two turns of cells are enough. A device is in the next sum once all parts of this one have reached it, so it
is ahead of another one by one sum at most, and that other one has emptied the cells of the sum before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import DTYPES, kernel
from pallas_kernels.sums.gpu.exchange import EMPTY, layout, numbers_at_once, sum_rows, write_address
from pallas_kernels.sums.gpu.rows import normed

TURNS = 2
MOST_ROWS = 128
"""Rows wait for those of other devices, so all of them must run at once: one on a multiprocessor."""
MOST_DEVICES = 8
MOST_COLUMNS = 8192
"""A thread's share of a row lies in its registers."""


def supported(rows: int, width: int, dtype: Any, senders: int) -> bool:
    """Whether there is a kernel for these rows."""
    return (
        dtype in DTYPES
        and rows <= MOST_ROWS
        and senders <= MOST_DEVICES
        and width <= MOST_COLUMNS
        and width % (128 * numbers_at_once(dtype)) == 0
    )


def open_cells(
    rows: int, width: int, dtype: Any, senders: int, here: int = 1
) -> tuple[Float[Array, "here 2 R senders M"], Int[Array, "here 2"]]:
    """Empty cells, and where they are, which is known no sooner than they are empty.

    Args:
      rows: R.
      width: M.
      dtype: of the residual stream.
      senders: devices that send to each other.
      here: how many of them this device stands for: itself; a test may let one stand for all.
    """
    over_threads = layout(width, dtype)

    def body(cells_ref, address_ref):
        device, row = lax.axis_index("device"), lax.axis_index("row")
        empty = plgpu.layout_cast(jnp.full((width,), EMPTY, dtype), over_threads)
        for turn in range(TURNS):
            for sender in range(senders):
                cells_ref[device, turn, row, sender] = empty
        write_address(cells_ref.at[device], address_ref.at[device])

    launch = kernel(
        body,
        name="open_cells",
        out_type=[
            jax.ShapeDtypeStruct((here, TURNS, rows, senders, width), dtype),
            jax.ShapeDtypeStruct((here, 2), jnp.int32),
        ],
        grid=(here, rows),
        grid_names=("device", "row"),
    )
    cells, address = launch()
    return cells, address


def add_sum(
    x: Float[Array, "R M"],
    parts: Float[Array, "here S rows M"],
    norm: Float[Array, " M"] | None,
    cells: Any,
    addresses: Int[Array, "senders 2"],
    sender: Int[Array, " here"],
    *,
    eps: float,
    turn: int,
) -> tuple[Float[Array, "here R M"], Float[Array, "here R M"]]:
    """See `pallas_kernels.sums.api.add_sum`.

    Args:
      x: the residual stream.
      parts: of each of the devices that this one stands for, see `open_cells`.
      norm: weight of the norm; None: no norm.
      cells: a reference, as `open_cells` made it.
      addresses: where the cells of all devices are.
      sender: which of them those are that this one stands for.
      eps: of the norm.
      turn: of the cells.
    """
    here, splits = parts.shape[:2]
    rows, width = x.shape
    senders, most_rows = addresses.shape[0], cells.shape[2]
    over_threads = layout(width, x.dtype)

    def body(x_ref, parts_ref, addresses_ref, sender_ref, *refs):
        norm_ref, (cells_ref, sums_ref, *normed_ref) = (None, refs) if norm is None else (refs[0], refs[1:])
        device, row = lax.axis_index("device"), lax.axis_index("row")

        def load(ref):
            return plgpu.load(ref, layout=over_threads, optimized=False)

        # What needs no other device is loaded before the wait for them.
        loaded = [load(parts_ref.at[device, split, row]).astype(jnp.float32) for split in range(splits)]
        part, old = sum(loaded[1:], loaded[0]).astype(x.dtype), load(x_ref.at[row]).astype(jnp.float32)
        weight = None if norm is None else load(norm_ref)
        place = (turn * most_rows + row) * senders + sender_ref[device]
        total = sum_rows(part, cells_ref.at[device, turn, row], addresses_ref, place)
        new = (old + total).astype(x.dtype)
        sums_ref[device, row] = new
        if norm is not None:
            (h,) = normed([new.astype(jnp.float32)], [weight], eps)
            normed_ref[0][device, row] = h.astype(x.dtype)

    launch = kernel(
        body,
        name="add_sum",
        out_type=[jax.ShapeDtypeStruct((here, *x.shape), x.dtype)] * (1 if norm is None else 2),
        grid=(here, rows),
        grid_names=("device", "row"),
    )
    # XLA would make one operation of the kernel and of a slice that it reads or that it writes to, and forget
    # that it changes its cells in place.
    x, parts, norm, *table = lax.optimization_barrier((x, parts, norm, addresses, sender))
    sums = launch(x, parts, *table, *([] if norm is None else [norm]), cells)
    return lax.optimization_barrier((sums[0], sums[-1]))
