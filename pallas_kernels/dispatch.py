"""One rule that picks the implementation of an operation.

`implementation=None` tries the kernels of the current backend and falls back to `"xla"`, the reference:
a kernel that does not support a shape or dtype raises `NotImplementedError` naming it, which is logged
once. A named implementation is used or its error is raised.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")
"""Every name that `implementation` may take."""

_KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
_logger = logging.getLogger(__name__)


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
      NotImplementedError: the named implementation does not exist, or not for these arguments.
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
        return candidates[implementation](*args, **kwargs)
    kernel = candidates.get(_KERNELS.get(jax.default_backend(), ""))
    if kernel is not None:
        try:
            return kernel(*args, **kwargs)
        except NotImplementedError as reason:
            _warn_once(f"{operation}: {reason}; using the XLA reference")
    return candidates["xla"](*args, **kwargs)
