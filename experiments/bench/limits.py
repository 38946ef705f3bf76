"""What a decode step must read, and how long its devices take to read it."""

import math

import jax
import jax.numpy as jnp

from retro_jax import Model
from retro_jax.drafts import weight_bytes
from retro_jax.sharding import HEADS, SEQUENCES, mesh_of


def limit_ms(
    model: Model, batch: int, kv_bytes: float, expert_bytes: float | None, gb_per_second: float
) -> float:
    """Returns the milliseconds of a step if reading were all of it, each device its own part at once.

    Args:
        model: its weights on their devices.
        batch: sequences of the step.
        kv_bytes: read of each one's cache.
        expert_bytes: read of experts' weights; None: there are none.
        gb_per_second: with which one device reads.
    """
    sizes = mesh_of(model.params).shape
    cache = batch * kv_bytes / sizes[SEQUENCES] / sizes[HEADS]
    experts = (expert_bytes or 0) / sizes[HEADS]
    return (device_weight_bytes(model) + experts + cache) / gb_per_second / 1e6


def device_weight_bytes(model: Model) -> float:
    """Returns the bytes of weights that a step reads on one device, without experts."""
    whole = weight_bytes(model.params, model.config, tokens=0)
    read = model.params if model.params.head is None else model.params.replace(embed=None)
    everywhere = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(read)
        if math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size
    )
    return everywhere + (whole - everywhere) / mesh_of(model.params).shape[HEADS]


def dense_kv_bytes(model: Model, tokens: int) -> int:
    """Returns the bytes of so many tokens' keys and values."""
    config = model.config
    item = jnp.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item * tokens
