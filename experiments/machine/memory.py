"""What a command takes of a device's memory, told before weights are read and before work begins."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.dispatch import HEADS, SEQUENCES
from retro_jax import DecodeConfig, init_state
from retro_jax.experiments.machine.devices import local_devices, memory_left
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import random_params
from retro_jax.sharding import check_mesh, params_shardings, state_shardings

SCORE_BLOCK = 1024
"""Keys to which a prefill's queries attend at once, in the reference."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      weights: of the model.
      state: the cache with its statistics, and the window.
      prefill: the largest array of a prompt chunk and the logits; the least that it takes beside them.
    """

    weights: int
    state: int
    prefill: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.prefill


@functools.cache  # asked before weights are read, and again when they are
def memory(
    model: ModelConfig,
    config: DecodeConfig,
    batch: int,
    capacity: int,
    data_devices: int = 1,
    model_devices: int = 1,
) -> Memory:
    """What decoding takes on each device of a mesh; allocates nothing.

    Args:
      model: the model's configuration.
      config: how to decode.
      batch: rows of the state: see `sizes.batch_rows`.
      capacity: tokens per sequence that the cache holds: see `sizes.cache_capacity`.
      data_devices: over which the batch is spread.
      model_devices: over which KV heads are spread.

    Raises:
      ValueError: the mesh does not divide the batch, the heads or the widths, or the capacity is beyond the
        model's positions.
    """
    mesh = AbstractMesh((data_devices, model_devices), (SEQUENCES, HEADS), axis_types=(AxisType.Auto,) * 2)
    check_mesh(model, mesh, batch)
    state = jax.eval_shape(functools.partial(init_state, model, config, batch, capacity))
    tokens = batch // data_devices * min(config.prefill_chunk, capacity)
    scores = 4 * tokens * model.num_heads * min(capacity, SCORE_BLOCK) // model_devices
    hidden = (
        tokens * max(model.hidden_widths.values()) * jax.numpy.dtype(model.dtype).itemsize // model_devices
    )
    logits = 4 * batch // data_devices * model.vocab_size
    held = _device_bytes(state, state_shardings(state, mesh))
    return Memory(_weights(model, mesh), held, max(scores, hidden) + logits)


def check_memory(
    model: ModelConfig,
    configs: Sequence[DecodeConfig],
    batch: int,
    capacity: int,
    *,
    loaded: bool = False,
    together: int = 1,
    data_devices: int = 1,
    model_devices: int = 1,
) -> None:
    """Refuses what does not fit the memory that is left on this machine's devices.

    Only what is sure not to fit: what XLA takes beside weights, caches and the largest array of a prefill is
    not counted, and where the memory cannot be told nothing is refused.

    Args:
      model: the model's configuration.
      configs: how to decode.
      batch: see `memory`.
      capacity: see `memory`; more than the model's positions is refused where the cache is made.
      loaded: whether the weights lie in memory already.
      together: of how many configurations, as they follow each other, the states are held at once.
      data_devices: see `memory`.
      model_devices: see `memory`.

    Raises:
      ValueError: it does not fit, or the mesh does not divide the batch, the heads or the widths.
    """
    capacity = min(capacity, model.max_positions)
    parts = [memory(model, config, batch, capacity, data_devices, model_devices) for config in configs]
    groups = itertools.batched(parts, together)
    largest = max(map(_at_once, groups), key=lambda part: part.total)
    if loaded:
        largest = replace(largest, weights=0)
    # Simulated devices of a CPU share its memory.
    shared = data_devices * model_devices if local_devices()[0].platform == "cpu" else 1
    weights = "" if loaded else f"weights {gigabytes(largest.weights * shared)}, "
    several = min(together, len(parts)) > 1
    check_room(
        f"{model.name} with {batch} x {capacity} tokens",
        largest.total * shared,
        f"{weights}{'caches and windows' if several else 'cache and window'} "
        f"{gigabytes(largest.state * shared)}, prefill {gigabytes(largest.prefill * shared)}",
        "fewer caches at once (a smaller --together), " * several,
    )


def _at_once(parts: Sequence[Memory]) -> Memory:
    """What configurations take whose states are held at once, and whose prefills follow each other."""
    largest = max(parts, key=lambda part: part.total)
    return replace(largest, state=sum(part.state for part in parts))


def check_room(what: str, needed: int, parts: str, ways: str = "") -> None:
    """Raises ValueError if something takes more bytes than are left on the first device.

    Args:
      what: takes them.
      needed: bytes.
      parts: of them, in words.
      ways: out that others do not have, each followed by a comma.
    """
    left = memory_left()
    if left is not None and needed > left:
        raise ValueError(
            f"{what} does not fit: it takes at least {gigabytes(needed)} ({parts}), and {gigabytes(left)} "
            f"are left on this machine's {local_devices()[0].device_kind}; use {ways}fewer tokens or "
            "sequences, a smaller model or --dtype, a --cache-dtype of 8 bits, or another device"
        )


def gigabytes(size: float) -> str:
    """A number of bytes in GB."""
    return f"{size / 1e9:.2f} GB"


@functools.cache
def _weights(model: ModelConfig, mesh: AbstractMesh) -> int:
    params = jax.eval_shape(lambda: random_params(model, jax.random.key(0)))
    return _device_bytes(params, params_shardings(params, mesh))


def _device_bytes(tree, shardings) -> int:
    """Bytes of arrays on each device that they are spread over."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
