"""One rule that picks the implementation of an operation.

`implementation=None` tries the kernels of the device and falls back to `"xla"`, the reference: a kernel that
does not support a shape or dtype raises `NotImplementedError` naming it, which is logged once. A named
implementation is used or its error is raised. Mosaic GPU kernels are for Hopper GPUs. XLA cannot partition
kernels: among several devices they are tried inside `shard_map` only, where each works on its own part.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")
"""Every name that `implementation` may take."""

_logger = logging.getLogger(__name__)


def kernels_of_device() -> str | None:
    """The implementation whose kernels run on the default device, if there is one."""
    device = jax.devices()[0]
    if device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9."):
        return "mosaic_gpu"
    return "mosaic_tpu" if device.platform == "tpu" else None


def _partitioned() -> bool:
    """Whether XLA may spread the operation over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.manual_axes and mesh.are_all_axes_manual)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def dispatch(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the implementation of `operation` that the rule above picks.

    Args:
      operation: name of the operation, for messages.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has.
      candidates: the implementations that exist, by name; `"xla"` always does.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: `implementation` is not a known name.
      NotImplementedError: the named implementation does not exist, or not for this device or these arguments.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation {implementation!r} is unknown; use None or one of "
                f"{', '.join(IMPLEMENTATIONS)}"
            )
        if implementation not in candidates:
            raise NotImplementedError(
                f"{operation} has no {implementation!r} implementation ({', '.join(candidates)}); "
                "use implementation=None"
            )
        if implementation not in ("xla", kernels_of_device()):
            raise NotImplementedError(
                f"{implementation!r} kernels do not run on {jax.devices()[0].device_kind}; "
                "use implementation=None"
            )
        return candidates[implementation](*args, **kwargs)
    kernel = candidates.get(kernels_of_device())
    if kernel is not None:
        try:
            if _partitioned():
                raise NotImplementedError(
                    f"XLA cannot partition the kernel among {jax.device_count()} devices; make one visible, "
                    "or call within shard_map"
                )
            return kernel(*args, **kwargs)
        except NotImplementedError as reason:
            _warn_once(f"{operation}: {reason}; using the XLA reference")
    return candidates["xla"](*args, **kwargs)
