"""What compiled programs leave behind: entries in JAX's persistent cache, and memory maps of this process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

MAPS, MAPS_LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


@contextlib.contextmanager
def not_cached() -> Iterator[None]:
    """What is compiled here neither comes from JAX's persistent compilation cache nor goes there.

    For programs of devices that are not here: JAX writes them, but cannot load what it has written.
    """
    enabled = jax.config.jax_enable_compilation_cache
    _set_enabled(False)
    try:
        yield
    finally:
        _set_enabled(enabled)


def _set_enabled(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX looks at the setting once, until this


def release(share: float = 0.25) -> bool:
    """Drops all compiled programs, to be compiled anew, once they take much of what this process may map.

    XLA gives each kernel of a CPU program three memory maps of its own, a small decode step hundreds. JAX
    keeps programs as long as it can, and Linux grants a process 65530 maps. Beyond them no memory is to be
    had: the first allocation to fail, often in JAX's write of its persistent cache, ends the process without
    an exception. Call it between pieces of work that compile programs of their own.

    Args:
      share: of the maps that a process may have, from which on programs are dropped.

    Returns:
      Whether they were dropped. Never where the system does not tell the number of maps, as only Linux does.
    """
    try:
        used, limit = MAPS.read_bytes().count(b"\n"), int(MAPS_LIMIT.read_text())
    except OSError:
        return False
    if used < share * limit:
        return False
    jax.clear_caches()
    return True
