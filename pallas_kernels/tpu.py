"""What the Mosaic TPU kernels share: the chips, and what the kernels support.

Compiling offline for another chip than the default device's goes by JAX's own switch:
`jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, with a mesh of that chip's devices, while tracing.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import traced_for
from pallas_kernels.operation import check_supported

DTYPES = (jnp.bfloat16, jnp.float32)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
PAGE_SIZES_IN_8_BITS = (16, 32, 64)
"""Their scales XLA lays out with pages along the lanes; those of 128 tokens fill the lanes themselves."""
LANES, SUBLANES = 128, 8
"""Of a vector register: a tile of 32-bit values."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Chip:
    """A kind of TPU. All but `cores` is per TensorCore.

    Attributes:
      name: as Google Cloud has it.
      bandwidth: of HBM, in bytes a second.
      clock: instruction bundles a second.
      vmem: bytes of vector memory that a kernel may use.
      smem: bytes of scalar memory that a kernel may use.
      cores: TensorCores that the parallel axis of a grid is spread over: those of one JAX device.
      page_size: the smallest at which a window of 4 waits for HBM about as long as it issues, or longer, at
        head_dim 128 in bfloat16; `retro-jax bench tpu-static` predicts it.
    """

    name: str
    bandwidth: float
    clock: float
    vmem: int
    smem: int
    cores: int
    page_size: int

    @property
    def bytes_per_bundle(self) -> float:
        """What HBM delivers while one instruction bundle issues."""
        return self.bandwidth / self.clock


_SMEM = _MIB - 16 * 1024  # what the compiler keeps for itself stays free
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1228e9 / 2, 1.05e9, 14 * _MIB, _SMEM, 2, 16),
        Chip("v5e", 819e9, 1.50e9, 64 * _MIB, _SMEM, 1, 16),
        Chip("v5p", 2765e9 / 2, 1.75e9, 32 * _MIB, _SMEM, 2, 32),
        Chip("v6e", 1638e9, 1.75e9, 64 * _MIB, _SMEM, 1, 32),
        Chip("tpu7x", 7380e9 / 2, 2.20e9, 32 * _MIB, _SMEM, 1, 64),
    )
}
"""By name. Bandwidth and cores: the page of each chip at https://cloud.google.com/tpu/docs. Memory sizes:
`jax.experimental.pallas.tpu.get_tpu_info_for_chip`; half of VMEM is left to XLA, less on a v4. A clock is
published for v4 only; it equals the peak in bfloat16 over what the matrix units do in a cycle (four of
128 x 128), and the others are derived so (v6e, tpu7x: as much as four of 256 x 256)."""

_OF_VERSION = {
    pltpu.ChipVersion.TPU_V4: "v4",
    pltpu.ChipVersion.TPU_V5E: "v5e",
    pltpu.ChipVersion.TPU_V5P: "v5p",
    pltpu.ChipVersion.TPU_V6E: "v6e",
    pltpu.ChipVersion.TPU_7X: "tpu7x",
}


def chip() -> Chip:
    """The chip that the kernel is traced for; a v5e where there is none.

    Raises:
      NotImplementedError: a TPU that is not in `CHIPS`.
    """
    device = traced_for()
    if device.platform != "tpu":  # the interpreter
        return CHIPS["v5e"]
    with contextlib.suppress(ValueError):  # a kind that JAX does not know
        version = pltpu.get_tpu_info().chip_version
        if version in _OF_VERSION:
            return CHIPS[_OF_VERSION[version]]
    raise NotImplementedError(f"{device.device_kind} has no Mosaic TPU kernel ({', '.join(CHIPS)})")


def check_support(dtype: Any, head_dim: int, page_size: int, *, in_8_bits: bool = False) -> None:
    """Raises `NotImplementedError` for what no kernel here supports.

    Args:
      dtype: of pages; beside those in 8 bits, of queries, keys and values.
      head_dim: D.
      page_size: S.
      in_8_bits: whether pages are.
    """
    check_supported(
        "Mosaic TPU",
        dtype=(dtype, DTYPES),
        head_dim=(head_dim, HEAD_DIMS),
        page_size=(page_size, PAGE_SIZES),
    )
    if in_8_bits:
        check_supported("Mosaic TPU", page_size_in_8_bits=(page_size, PAGE_SIZES_IN_8_BITS))


def tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Of an array in VMEM, where the last two axes fill whole registers."""
    *outer, rows, columns = shape
    size = jnp.dtype(dtype).itemsize
    sublanes = SUBLANES * 4 // size
    return math.prod(outer) * -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * size


def check_memory(operation: str, chip: Chip, *, vmem: int, smem: int) -> None:
    """Refuses shapes whose buffers do not fit, before the compiler would.

    Args:
      operation: its name.
      chip: that the kernel is traced for.
      vmem: bytes of vector memory that the kernel needs.
      smem: bytes of scalar memory that it needs.

    Raises:
      NotImplementedError: naming what is needed and the limit.
    """
    for kind, needed, limit in (("VMEM", vmem, chip.vmem), ("SMEM", smem, chip.smem)):
        if needed > limit:
            raise NotImplementedError(
                f"{operation}: needs {needed} bytes of {kind}, and a {chip.name} has {limit}"
            )
