"""Where a result comes from: the commit, the versions, the device, the command and the date."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("retro-jax", "jax", "jaxlib", "flax", "numpy")


def provenance() -> dict:
    """Returns what is needed to tell where and by what a result was computed, ready for JSON."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "cpus": cpus(),
    }


def _version(package: str) -> str | None:
    """None where the code is used without being installed, which must not lose a result."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpus() -> int:
    """Returns how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Returns the checkout's commit, marked when files differ from it.

    Where git does not answer, what the environment variable RETRO_JAX_COMMIT says, or None.
    """
    checkout = Path(__file__).resolve().parents[2]
    told = os.environ.get("RETRO_JAX_COMMIT")
    if not (checkout / ".git").exists():
        return told
    try:
        head = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return told
    return f"{head} with changes" if changed else head


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
