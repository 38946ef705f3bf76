"""Several devices: the batch over the mesh axis `data`, KV heads over the axis `model`.

Arguments placed by these functions make `jax.jit` compile the pure functions for the whole mesh. A KV head,
its pages, its page selection and its query heads stay on one device; the only communication is the sum of the
output projections and of the MLPs, as in any tensor-parallel transformer. Call them under
`jax.set_mesh(mesh)`, so that operations on pages know the mesh too; without it they run through XLA wherever
there are several devices, which gathers scores and page ids of all heads on each. `generate` and `score` do
so by themselves.

The devices of a mesh may belong to several processes, which `jax.distributed.initialize` has joined. Each of
them then makes the same calls with the same arguments, and gets the same results.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey, SequenceKey, keystr

from pallas_kernels.dispatch import HEADS, SEQUENCES
from pallas_kernels.settings import under_fixed_settings
from retro_jax.config import DecodeConfig
from retro_jax.inputs import check_whole
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params, random_params
from retro_jax.state import DecodeState, init_state


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `data` x `model` devices, over whose axes XLA distributes the computation.

    Args:
      data: devices along the batch.
      model: devices along the KV heads.
      devices: to choose from; None: all devices of all hosts.

    Raises:
      ValueError: there are not so many devices, or a number is below 1.
      TypeError: a number is not whole.
    """
    check_whole(data=data, model=model)
    devices = jax.devices() if devices is None else devices
    if data * model > len(devices):
        raise ValueError(
            f"{data} x {model} devices were asked for, {len(devices)} are there; use fewer, or pass others"
        )
    chosen = devices[: data * model]
    return jax.make_mesh((data, model), (SEQUENCES, HEADS), (AxisType.Auto,) * 2, devices=chosen)


def check_mesh(model: ModelConfig, mesh: Mesh | AbstractMesh, batch: int) -> None:
    """Raises ValueError if the mesh is not one of `make_mesh`, or does not divide batch, heads or widths."""
    if tuple(mesh.shape) != (SEQUENCES, HEADS) or set(mesh.axis_types) != {AxisType.Auto}:
        types = tuple(map(str, mesh.axis_types))
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)} of types {types}; use make_mesh")
    sizes = {
        "batch": (batch, SEQUENCES),
        "num_kv_heads": (model.num_kv_heads, HEADS),
    }
    sizes |= {field: (width, HEADS) for field, width in model.hidden_widths.items()}
    if not model.tie_embeddings:
        sizes["vocab_size"] = model.vocab_size, HEADS
    for name, (size, axis) in sizes.items():
        if size % mesh.shape[axis]:
            common = math.gcd(*(other for other, of in sizes.values() if of == axis))
            fitting = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
            raise ValueError(
                f"{name} {size} does not divide over {mesh.shape[axis]} devices of mesh axis {axis!r}; "
                f"a number that fits there is one of {fitting}"
            )


def mesh_of(params: Params) -> Mesh:
    """The mesh that weights were placed on; the one of their device where they lie on one."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    (device,) = sharding.device_set
    return Mesh(np.array([[device]]), (SEQUENCES, HEADS), axis_types=(AxisType.Auto,) * 2)


def under_mesh_of_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model that runs under the mesh of its weights, and under fixed settings of JAX."""

    @functools.wraps(function)
    @under_fixed_settings
    def on_mesh(model, *args, **kwargs):
        with jax.set_mesh(mesh_of(model.params)):
            return function(model, *args, **kwargs)

    return on_mesh


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, whole on each of the processes that they are spread over.

    Those processes must all call it.
    """

    def whole(array):
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return np.asarray(array)

    return jax.tree.map(whole, tree)


def check_processes_agree(**arguments: object) -> None:
    """Raises ValueError if processes that share the mesh that is set were given different arguments.

    They would wait for each other forever, or mix what they were given. Comes before any other check, which
    only some of them might pass. Arguments are compared by `repr`.
    """
    mesh = jax.sharding.get_mesh()
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return
    with np.printoptions(threshold=sys.maxsize):
        texts = [repr(value).encode() for value in arguments.values()]
    digests = np.stack([np.frombuffer(hashlib.sha256(text).digest(), np.uint8) for text in texts])
    spread = NamedSharding(mesh, P((SEQUENCES, HEADS)))
    shape = (mesh.size, *digests.shape)
    given = to_host(jax.make_array_from_callback(shape, spread, lambda _: digests[None]))
    differing = np.any(given != given[0], axis=(0, 2))
    if differing.any():
        names = ", ".join(name for name, differs in zip(arguments, differing, strict=True) if differs)
        raise ValueError(f"the processes of the mesh were given different {names}; give all of them the same")


def params_shardings(params: Params, mesh: Mesh | AbstractMesh) -> Params:
    """How `shard_params` places each weight: as its field says by `weight`; `params` may be shapes only.

    Raises:
      TypeError: no field says it for a weight.
    """

    def spec(path, array):
        axis = _declared(params, path, "divided", "`weight` of retro_jax.models.transformer")
        return P() if axis is None else P(*(HEADS if index == axis else None for index in range(array.ndim)))

    return jax.tree_util.tree_map_with_path(lambda *leaf: NamedSharding(mesh, spec(*leaf)), params)


def state_shardings(state: DecodeState, mesh: Mesh | AbstractMesh) -> DecodeState:
    """How `shard_state` places each array: as its field says by `cache.spread`; `state` may be shapes only.

    Raises:
      TypeError: no field says it for an array.
    """

    def spec(path, _):
        return P(*_declared(state, path, "spread", "`spread` of retro_jax.cache"))

    return jax.tree_util.tree_map_with_path(lambda *leaf: NamedSharding(mesh, spec(*leaf)), state)


def _declared(tree: Any, path: tuple, what: str, by: str) -> Any:
    """What the outermost field on the path that says `what` in its metadata says of the arrays in it."""
    node = tree
    for key in path:
        if isinstance(key, GetAttrKey):
            field = getattr(type(node), "__dataclass_fields__", {}).get(key.name)
            if field is not None and what in field.metadata:
                return field.metadata[what]
            node = getattr(node, key.name)
        else:
            node = node[key.idx if isinstance(key, SequenceKey) else key.key]
    where = type(tree).__name__ + keystr(path)
    raise TypeError(f"{where} does not say how it is spread over a mesh; declare its field by {by}")


@under_fixed_settings
def abstract_arguments(
    model: ModelConfig, config: DecodeConfig, mesh: Mesh | AbstractMesh, batch: int, capacity: int
) -> tuple[Params, DecodeState]:
    """Weights and an empty state as shapes placed on the mesh, to lower a program without the arrays.

    Raises:
      ValueError: see `init_state` and `check_mesh`.
    """
    check_mesh(model, mesh, batch)
    params = jax.eval_shape(lambda: random_params(model, jax.random.key(0)))
    state = jax.eval_shape(functools.partial(init_state, model, config, batch, capacity))

    def place(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return (
        jax.tree.map(place, params, params_shardings(params, mesh)),
        jax.tree.map(place, state, state_shardings(state, mesh)),
    )


def params_on(mesh: Mesh) -> Callable[[ModelConfig, Params], Params]:
    """Where `shard_params` would place weights, for `load_model` to read them there at once.

    What it returns raises ValueError for a model that the mesh does not divide, see `check_mesh`.
    """

    def shardings(model: ModelConfig, params: Params) -> Params:
        check_mesh(model, mesh, mesh.shape.get(SEQUENCES, 1))
        return params_shardings(params, mesh)

    return shardings


def shard_params(params: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """Weights placed on the mesh as by `params_shardings`.

    Raises:
      ValueError: see `check_mesh`.
    """
    return jax.device_put(params, params_on(mesh)(model, params))


def shard_state(state: DecodeState, model: ModelConfig, mesh: Mesh) -> DecodeState:
    """A decode state placed on the mesh as by `state_shardings`.

    Raises:
      ValueError: see `check_mesh`.
    """
    check_mesh(model, mesh, state.length.shape[0])
    return jax.device_put(state, state_shardings(state, mesh))


@under_fixed_settings
def new_state(model: ModelConfig, config: DecodeConfig, batch: int, capacity: int) -> DecodeState:
    """`init_state`; under `jax.set_mesh` on the mesh, without ever lying on one device as a whole.

    Raises:
      ValueError: see `init_state` and `check_mesh`.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return init_state(model, config, batch, capacity)
    make = functools.partial(init_state, model, config, batch, capacity)
    return jax.jit(make, out_shardings=returned_shardings(model, jax.eval_shape(make), mesh))()


def returned_shardings(model: ModelConfig, state: DecodeState, mesh: Mesh) -> DecodeState:
    """How a state lies on a mesh as programs return it; `state` may be shapes only.

    That is without axes of one device, and without any for an array that has no elements: a program that gets
    a new state would else be compiled anew when it gets its own result.

    Raises:
      ValueError: see `check_mesh`.
    """
    check_mesh(model, mesh, state.length.shape[0])

    def spec(sharding: NamedSharding, array: jax.ShapeDtypeStruct) -> NamedSharding | SingleDeviceSharding:
        if mesh.size == 1:
            return SingleDeviceSharding(mesh.devices.item())
        if 0 in array.shape:
            return NamedSharding(mesh, P())
        axes = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in sharding.spec]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(spec, state_shardings(state, mesh), state)
