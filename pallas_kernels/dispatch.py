"""One rule that picks the implementation of an operation.

`implementation=None` tries the kernels of the device and falls back to `"xla"`, the reference: a kernel that
does not support a shape or dtype raises `NotImplementedError` naming it, which is logged once, however many
layers and operations ask; so is an operation without a kernel. A named implementation is used or its error is
raised. Mosaic GPU kernels are for Hopper GPUs.

Under a mesh (`jax.set_mesh`) with axes `SEQUENCES` and `HEADS`, every device runs the operation on its own
sequences and KV heads, which need nothing from each other: XLA cannot partition kernels, and references only
by gathering scores and page ids of all heads on every device. Among several devices without a mesh, kernels
run inside `shard_map` only, and XLA partitions references as it can.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.settings import under_fixed_settings

SEQUENCES, HEADS = "data", "model"
"""Axes of a mesh of devices, over which sequences and KV heads are spread."""
BY_HEAD = P(HEADS)
"""How an array with an entry for each query head is spread."""
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")
"""Every name that `implementation` may take."""

HOPPER = ("H100", "H200", "H20", "H800", "GH200")
"""In the names of devices whose compute capability cannot be asked for, since they are absent."""

_logger = logging.getLogger(__name__)


def traced_for() -> Any:
    """A device of the mesh that is set, which may be absent and compiled for, else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def kernels_of_device() -> str | None:
    """The implementation whose kernels run on the device that is traced for, if there is one."""
    device = traced_for()
    if device.platform == "tpu":
        return "mosaic_tpu"
    if device.platform != "gpu":
        return None
    present = jax.devices()[0]
    if present.platform == "gpu":
        hopper = str(getattr(present, "compute_capability", "")).startswith("9.")
    else:
        hopper = any(name in device.device_kind for name in HOPPER)
    return "mosaic_gpu" if hopper else None


def by_sequence(*heads_axes: int | None) -> tuple[P, ...]:
    """How arrays whose first axis is sequences are spread: each one's axis of heads, None for none."""
    return tuple(
        P(SEQUENCES) if axis is None else P(SEQUENCES, *[None] * (axis - 1), HEADS) for axis in heads_axes
    )


def _why_not_spread(mesh: AbstractMesh) -> str | None:
    """Why operations cannot be spread over a mesh; None if they can."""
    if {SEQUENCES, HEADS} == set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}:
        return None
    types = tuple(map(str, mesh.axis_types))
    return (
        f"the mesh has axes {mesh.axis_names} of types {types}; kernels know {SEQUENCES!r} and {HEADS!r} of "
        "type Auto only"
    )


def _kernel_by_part(kernel, spread):
    """The kernel as it is to be called here: on each device's own part, if there are several.

    Raises:
      NotImplementedError: XLA would be left to partition it, and would gather all arguments on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and mesh.are_all_axes_manual:
        return kernel
    if mesh.size > 1:
        if spread is None:
            raise NotImplementedError("what the operation is given does not say how it is spread over a mesh")
        if reason := _why_not_spread(mesh):
            raise NotImplementedError(reason)
        arguments, results = spread
        return jax.shard_map(kernel, in_specs=arguments, out_specs=results, check_vma=False)
    if mesh.empty and jax.device_count() > 1:
        raise NotImplementedError(
            f"XLA cannot partition the kernel among {jax.device_count()} devices; name a mesh of them with "
            "jax.set_mesh, make one device visible, or call within shard_map"
        )
    return kernel


def _reference_by_part(reference, spread, args):
    """What the reference gives, each device computing its own part where the mesh divides the arguments."""
    mesh = jax.sharding.get_abstract_mesh()
    if spread is None or mesh.size == 1 or mesh.manual_axes or _why_not_spread(mesh):
        return reference(*args)
    specs, results = spread
    arrays = [
        (array, spec)
        for spec, argument in zip(specs, args, strict=True)
        for array in jax.tree.leaves(argument)
    ]
    if any(
        axis is not None and size % mesh.shape[axis]
        for array, spec in arrays
        for size, axis in zip(jnp.shape(array), spec, strict=False)
    ):
        return reference(*args)

    def of_part(*parts):
        return reference(*map(_made_anew, parts, args, specs))

    # XLA crashes on parts of arrays without elements in a loop, as those of older slots of one are.
    given = [None if _is_empty(argument) else argument for argument in args]
    return jax.shard_map(of_part, in_specs=specs, out_specs=results, check_vma=False)(*given)


def _is_empty(argument):
    return isinstance(argument, jax.Array) and argument.size == 0


def _made_anew(part, argument, spec):
    """A device's part of an argument, made there if it has no elements."""
    if not _is_empty(argument):
        return part
    mesh = jax.sharding.get_abstract_mesh()
    return jnp.zeros(NamedSharding(mesh, spec).shard_shape(argument.shape), argument.dtype)


_WAY_OUT = "use implementation=None, which falls back to the XLA reference, or 'xla'"


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


@under_fixed_settings
def dispatch(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, Callable[..., Any]],
    spread: tuple[Any, Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the implementation of `operation` that the rule above picks.

    Args:
      operation: name of the operation, for messages.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that this backend has.
      candidates: the implementations that exist, by name; `"xla"` always does.
      spread: how arguments and results are spread over a mesh of devices, see `by_sequence`. None: something
        that belongs to heads is none of the arguments, so that the operation is left to XLA's partitioner.
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
                f"{operation} has no {implementation!r} implementation ({', '.join(candidates)}); {_WAY_OUT}"
            )
        if implementation not in ("xla", kernels_of_device()):
            raise NotImplementedError(
                f"{implementation!r} kernels do not run on {traced_for().device_kind}; {_WAY_OUT}"
            )
        if implementation == "xla":
            return _reference_by_part(functools.partial(candidates["xla"], **kwargs), spread, args)
        try:
            return _kernel_by_part(functools.partial(candidates[implementation], **kwargs), spread)(*args)
        except NotImplementedError as reason:
            raise NotImplementedError(f"{operation}: {reason}; {_WAY_OUT}") from reason
    name = kernels_of_device()
    if name in candidates:
        try:
            return _kernel_by_part(functools.partial(candidates[name], **kwargs), spread)(*args)
        except NotImplementedError as reason:
            _warn_once(f"{reason}; using the XLA reference")
    elif name is not None:
        _warn_once(f"{operation} has no {name!r} implementation; using the XLA reference")
    return _reference_by_part(functools.partial(candidates["xla"], **kwargs), spread, args)
