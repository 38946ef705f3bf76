"""Several devices: the batch over the mesh axis `data`, KV heads over the axis `model`.

Arguments placed by these functions make `jax.jit` compile the pure functions for the whole mesh. A KV head,
its pages, its page selection and its query heads stay on one device; the only communication is the sum of
the output projections, as in any tensor-parallel transformer. Call them under `jax.set_mesh(mesh)` so that
kernels, which XLA cannot partition, know the mesh too; without it operations on pages run through XLA
wherever there are several devices. `generate` and `score` do so by themselves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from models.transformer import Params
from retro_jax.config import DecodeConfig
from retro_jax.state import DecodeState, init_state

_COLUMNS = {"wq", "wk", "wv", "w_gate", "w_up", "head"}
_ROWS = {"wo", "w_down"}
_CHANNELS = {"bq", "bk", "bv"}
_STATE = {
    "pages": P("data", "model"),
    "statistics": P("data", "model"),
    "values": P("data", "model"),
    "scales": P("data", "model"),
    "block_values": P("data", "model"),
    "last_loaded": P("data", "model"),
    "o": P("data", None, "model"),
    "lse": P("data", None, "model"),
    "alive": P("data", "model"),
    "mass": P("data", "model"),
    "queries": P("data", None, "model"),
}


def _name(path: tuple) -> str:
    return path[-1].name


def _params_spec(path: tuple) -> P:
    name = _name(path)
    if name in _COLUMNS:
        return P(None, "model")
    if name in _ROWS:
        return P("model", None)
    return P("model") if name in _CHANNELS else P()


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `data` x `model` devices, over whose axes XLA distributes the computation.

    Args:
      data: devices along the batch.
      model: devices along the KV heads.
      devices: to choose from; None: all devices of all hosts.

    Raises:
      ValueError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(f"{data} x {model} devices were asked for, {len(devices)} are there")
    chosen = devices[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=chosen)


def check_mesh(model: ModelConfig, mesh: Mesh | AbstractMesh, batch: int) -> None:
    """Raises ValueError if the mesh is not one of `make_mesh`, or does not divide batch, heads or widths."""
    if tuple(mesh.shape) != ("data", "model") or set(mesh.axis_types) != {AxisType.Auto}:
        types = tuple(map(str, mesh.axis_types))
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)} of types {types}; use make_mesh")
    sizes = {
        "batch": (batch, "data"),
        "num_kv_heads": (model.num_kv_heads, "model"),
        "hidden_width": (model.hidden_width, "model"),
    }
    for name, (size, axis) in sizes.items():
        if size % mesh.shape[axis]:
            raise ValueError(
                f"{name} {size} does not divide over {mesh.shape[axis]} devices of mesh axis {axis!r}; "
                "use another mesh"
            )


def mesh_of(params: Params) -> Mesh:
    """The mesh that weights were placed on; the one of their device where they lie on one."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    (device,) = sharding.device_set
    return Mesh(np.array([[device]]), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def under_mesh_of_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model that runs under the mesh of its weights."""

    @functools.wraps(function)
    def on_mesh(model, *args, **kwargs):
        with jax.set_mesh(mesh_of(model.params)):
            return function(model, *args, **kwargs)

    return on_mesh


def params_shardings(params: Params, mesh: Mesh | AbstractMesh) -> Params:
    """How `shard_params` places each weight; `params` may be shapes only."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, _params_spec(path)), params)


def state_shardings(state: DecodeState, mesh: Mesh | AbstractMesh) -> DecodeState:
    """How `shard_state` places each array; `state` may be shapes only."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, _STATE.get(_name(path), P("data"))), state
    )


def shard_params(params: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """Weights placed on the mesh as by `params_shardings`.

    Raises:
      ValueError: see `check_mesh`.
    """
    check_mesh(model, mesh, mesh.shape.get("data", 1))
    if params.head is not None and model.vocab_size % mesh.shape["model"]:
        raise ValueError(
            f"vocab_size {model.vocab_size} does not divide over {mesh.shape['model']} devices of mesh axis "
            "'model'; use another mesh"
        )
    return jax.device_put(params, params_shardings(params, mesh))


def shard_state(state: DecodeState, model: ModelConfig, mesh: Mesh) -> DecodeState:
    """A decode state placed on the mesh as by `state_shardings`.

    Raises:
      ValueError: see `check_mesh`.
    """
    check_mesh(model, mesh, state.length.shape[0])
    return jax.device_put(state, state_shardings(state, mesh))


def new_state(model: ModelConfig, config: DecodeConfig, batch: int, capacity: int) -> DecodeState:
    """`init_state`; under `jax.set_mesh` on the mesh, without ever lying on one device as a whole.

    Raises:
      ValueError: see `init_state` and `check_mesh`.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return init_state(model, config, batch, capacity)
    check_mesh(model, mesh, batch)
    make = functools.partial(init_state, model, config, batch, capacity)
    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make), mesh))()
