"""How programs over several devices are compiled, so that sums over GPUs are part of CUDA graphs."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

_CAPTURED = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUSTOM_CALL",
    "CUDNN",
    "DYNAMIC_SLICE_FUSION",
    "CONDITIONAL",
    "COLLECTIVES",
)
SEVERAL_GPUS = {
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_enable_command_buffer": ",".join(_CAPTURED),
}
"""By default XLA sums small arrays over GPUs of one process by a kernel of its own, which no CUDA graph can
hold: each layer's two sums cut the step. NCCL's sums can be part of its graphs."""


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What programs over a mesh are best compiled with: `jax.jit(step, compiler_options=...)`.

    `generate`, `score` and whatever else compiles by itself use it. Several GPUs of one process get settings
    of XLA, unless XLA_FLAGS has one of them or this release does not know them; all other devices get none.
    """
    return _options_of(list(mesh.devices.flat))


def _options_of(devices):
    if len(devices) == 1 or devices[0].platform != "gpu" or len({each.process_index for each in devices}) > 1:
        return {}
    if any(name in os.environ.get("XLA_FLAGS", "") for name in SEVERAL_GPUS):
        return {}
    return dict(SEVERAL_GPUS) if _known_to_xla(devices[0]) else {}


@functools.cache
def _known_to_xla(device: jax.Device) -> bool:
    """Whether the device's compiler takes the settings, which are none that XLA promises to keep."""
    try:
        with jax.default_device(device):
            jax.jit(lambda: 0, compiler_options=SEVERAL_GPUS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        logging.getLogger(__name__).warning("decoding on several GPUs may be slow: XLA says %s", reason)
        return False
    return True


class JitForMesh:
    """`jax.jit` with the `compiler_options` of the mesh that is set when the function is called.

    Args:
      function: to compile.
      **how: keyword arguments of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], **how: Any):
        functools.update_wrapper(self, function)
        self._function, self._how = function, how
        self._jitted: dict[tuple[tuple[str, str], ...], Any] = {(): jax.jit(function, **how)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        mesh = jax.sharding.get_mesh()
        options = {} if mesh.empty else compiler_options(mesh)
        key = tuple(options.items())
        if key not in self._jitted:
            self._jitted[key] = jax.jit(self._function, compiler_options=options, **self._how)
        return self._jitted[key](*args, **kwargs)

    def _cache_size(self) -> int:
        """How many programs are kept, as a function of `jax.jit` says it."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())
