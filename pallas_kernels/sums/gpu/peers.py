"""Whether the GPUs of this process reach each other's memory."""

import ctypes
import functools
import itertools
import logging

import jax

_logger = logging.getLogger(__name__)


def reach_each_other() -> bool:
    """Whether all GPUs that JAX sees belong to this process, and each can read and write the others' memory.

    XLA lets them, where the driver says that they can.
    """
    return jax.process_count() == 1 and _driver_says(
        tuple(device.local_hardware_id for device in jax.local_devices())
    )


@functools.cache
def _driver_says(numbers: tuple[int, ...]) -> bool:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    can = ctypes.c_int()
    for one, other in itertools.permutations(numbers, 2):
        # A device of the driver is the number that it has in this process.
        if cuda.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) or not can.value:
            _logger.warning(
                "GPU %s does not reach the memory of GPU %s: sums over devices are XLA's", one, other
            )
            return False
    return True
