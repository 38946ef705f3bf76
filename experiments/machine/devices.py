"""The devices that this process computes on: whether JAX starts on any, and what memory they have left."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax


def local_devices() -> list[jax.Device]:
    """Returns this host's devices; starts JAX where it has not started.

    Raises:
      ValueError: JAX starts on none of the platforms that it was told to use, or finds none.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms
        told = f"JAX_PLATFORMS={platforms}" if platforms else "the platforms that it found"
        reason = " ".join(str(error).split()) or "there is no such device here, or no plugin for it"
        raise ValueError(
            f"JAX cannot start with {told}: {reason}; name a platform that this machine has, such as "
            "JAX_PLATFORMS=cpu, or unset it and JAX chooses"
        ) from error


def memory_left() -> int | None:
    """Returns the bytes that the first device can still hold, or its machine for a CPU; None if unknown."""
    device = local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory_left() if device.platform == "cpu" else None


def host_memory_left(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still take of the host's memory, swap included.

    What the kernel calls available, or less where a control group allows less; all of the machine's where
    there is no /proc. None if neither can be told.

    Args:
      root: of the file system.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return min([free["MemAvailable"], *_left_to_groups(root)]) + free["SwapFree"]
    except (OSError, ValueError, KeyError):
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return None


def _left_to_groups(root: Path) -> Iterator[int]:
    """The bytes that each control group that this process is in may still take; caches of files can go."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            try:
                allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # the root has no limit, and a container may not show the groups around it
            if allowed != "max":
                yield int(allowed) - used + int(stat["inactive_file"]) + int(stat["active_file"])
