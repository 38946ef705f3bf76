"""How fast a device reads its memory: the ceiling of all that decoding does."""

import jax
import jax.numpy as jnp

from retro_jax.experiments.bench.device_time import device_time
from retro_jax.experiments.bench.kernel_cases import normal, random_keys


def read_bandwidth(size: int, calls: int = 50, warm_up: int = 5) -> dict[str, float]:
    """Measures how fast the device reads a large array, by several reductions.

    Args:
      size: of the array in bytes, far above any cache's.
      calls: of each reduction to time.
      warm_up: calls before those.

    Returns:
      1e9 bytes per second of each reduction.
    """
    columns = min(4096, max(1, size // 4))
    rows = max(1, size // 4 // columns)
    reductions = {
        "sum of float32": ("float32", lambda x: jnp.sum(x)),
        "sums of rows of float32": ("float32", lambda x: jnp.sum(x, axis=1)),
        "sums of rows of bfloat16": ("bfloat16", lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)),
    }
    found = {}
    for name, (dtype, reduce) in reductions.items():
        item = jnp.dtype(dtype).itemsize
        x = normal(next(random_keys(0)), (rows * 4 // item, columns), dtype)
        step = jax.jit(reduce)
        timing = device_time(lambda _, step=step, x=x: step(x), calls, warm_up)
        found[name] = x.nbytes / timing.busy_us / 1e3
    return found
