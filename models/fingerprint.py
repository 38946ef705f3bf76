"""What tells arrays from others: a short text that depends on every bit of them, wherever they lie.

Sums of whole numbers are the same in any order, so that a device, a mesh or a host computes the same text.
It guards against mistakes and damage, not against forgers.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, UInt

_NO_MESH = Mesh(np.empty((), object), ())
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "layers.0.wqkv"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def fingerprint(
    arrays: Mapping[str, Array | np.ndarray], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> str:
    """16 hexadecimal digits that tell arrays, of at most 32 bits a number, from others.

    Args:
        arrays: by name. Processes that they are spread over must all call it.
        shapes: of each array the part that counts, from its beginning; None: all of it.
    """
    shapes = {name: array.shape for name, array in arrays.items()} if shapes is None else shapes
    names = sorted(arrays)
    with jax.set_mesh(_NO_MESH):  # each part is summed on one device
        sums = np.array([_sum_of_parts(arrays[name], shapes[name]) for name in names], np.uint32)
    if not all(getattr(array, "is_fully_addressable", True) for array in arrays.values()):
        sums = np.sum(multihost_utils.process_allgather(sums), axis=0, dtype=np.uint32)
    lines = (
        f"{name} {arrays[name].dtype.name} {tuple(shapes[name])} {total}"
        for name, total in zip(names, sums.tolist(), strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _sum_of_parts(array: Array | np.ndarray, shape: tuple[int, ...]) -> int:
    """`_sum_of_bits` of what is counted in this process of an array, one part after another.

    Parts come to one device, for which alone the sum is compiled; to add up where they lie would be a
    collective for each array.
    """
    if not isinstance(array, jax.Array):
        return int(_sum_of_bits(array, np.zeros(array.ndim, np.uint32), shape))
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            begin = np.array([part.start or 0 for part in shard.index], np.uint32)
            part = jax.device_put(shard.data, array.addressable_shards[0].device)
            total += int(_sum_of_bits(part, begin, shape))
    return total & 0xFFFFFFFF


@functools.partial(jax.jit, static_argnames="shape")
def _sum_of_bits(
    array: Array | np.ndarray, begin: UInt[Array | np.ndarray, " axes"], shape: tuple[int, ...]
) -> UInt[Array, ""]:
    """The sum of each number's bits, mixed with its place, as whole numbers of 32 bits that wrap around."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    place, counts = jnp.zeros(array.shape, jnp.uint32), jnp.ones(array.shape, bool)
    for axis, size in enumerate(shape):
        index = lax.broadcasted_iota(jnp.uint32, array.shape, axis) + begin[axis]
        place, counts = place * jnp.uint32(size) + index, counts & (index < size)
    mixed = bits + place * jnp.uint32(0x9E3779B1)
    # The finalizer of MurmurHash3: each bit of its input changes about half of its result's.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed ^= mixed >> 16
    return jnp.sum(jnp.where(counts, mixed, jnp.uint32(0)), dtype=jnp.uint32)
