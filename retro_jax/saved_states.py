"""Decode states that outlive their process: written into a folder, and read onto any mesh.

A folder holds all arrays of a state, and as JSON what it was made with: the sizes of the model, a fingerprint
of its weights, the configuration, and of a `Generation` also the text so far, what is still pending and how
tokens are chosen. A state goes on with the same model and configuration only, but on other devices, in a
batch with more rows and in a longer cache.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from retro_jax.budget import Budget
from retro_jax.config import DecodeConfig
from retro_jax.generate import Generation
from retro_jax.inputs import check_whole
from retro_jax.models import Model, ModelConfig
from retro_jax.models.config_json import from_json, to_json
from retro_jax.models.fingerprint import fingerprint, named_arrays
from retro_jax.models.formats.checkpoint import read_about, read_arrays, write_checkpoint
from retro_jax.sampling import Sampling
from retro_jax.sharding import returned_shardings, to_host, under_mesh_of_weights
from retro_jax.sizes import batch_rows
from retro_jax.state import DecodeState, init_state

KIND = "state"

_AS_WRITTEN = ("texts", "tokens", "logprobs", "finished", "turns", "exact", "verify")
"""Fields of a `Generation` that are JSON values."""


@under_mesh_of_weights
def save_state(
    model: Model, state: Generation | DecodeState, folder: str | Path, config: DecodeConfig | None = None
) -> None:
    """Writes a state into a new folder, for `load_state`. Processes that share a mesh all call it.

    Args:
      model: that it was made with.
      state: the result of `generate`, or the state of a loop of your own, to which what is pending and the
        random keys do not belong.
      folder: must not exist; it has its name only when all of it is written.
      config: that a `DecodeState` was made with; a `Generation` has its own.

    Raises:
      OSError: the folder exists or could not be written; nothing of it is kept then.
      TypeError: a `DecodeState` comes without its configuration.
      ValueError: the state was made with another model or configuration, as far as its arrays and its
        budget tell, or was decoded further, which consumed it.
    """
    result = state if isinstance(state, Generation) else None
    if result is not None:
        if config not in (None, result.config):
            raise ValueError(f"the generation was decoded by {result.config}, not by {config}; leave it out")
        state, config = result.state, result.config
    if config is None:
        raise TypeError("a DecodeState does not know its configuration; pass it as config")
    arrays = named_arrays(state)
    if any(isinstance(array, jax.Array) and array.is_deleted() for array in arrays.values()):
        raise ValueError("the state was decoded further, which consumed it; save the later one")
    rows, capacity = state.length.shape[0], min(state.capacity, model.config.max_positions)
    state.check_made_by(model.config, config)
    _check_budget(config, state)
    about = {
        "model": to_json(model.config),
        "weights": fingerprint(_weights(model, config)),
        "config": asdict(config),
        "rows": rows,
        "capacity": capacity,
        "lengths": to_host(state.length).tolist(),
        "generation": None if result is None else _generation_json(result),
    }
    write_checkpoint(Path(folder), KIND, about, arrays)


def read_state_about(folder: str | Path) -> dict[str, Any]:
    """What `save_state` wrote of a state besides its arrays, as JSON values.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it was not finished, is damaged, of another version, or holds no state.
    """
    return read_about(Path(folder), KIND)


@under_mesh_of_weights
def load_state(
    model: Model, folder: str | Path, config: DecodeConfig | None = None, *, capacity: int | None = None
) -> Generation | DecodeState:
    """Reads what `save_state` wrote, onto the devices that the weights lie on.

    Each device, and each host, reads its part alone. The rows after the sequences of a `Generation` become as
    many as the mesh needs; those of a `DecodeState` must divide over it.

    Args:
      model: the same, from wherever it was loaded.
      folder: of `save_state`.
      config: what it must have been decoded with, but for `implementation`, which may be another; None:
        whatever that was.
      capacity: tokens per sequence that the cache must hold from now on; None or fewer: as many as before.

    Returns:
      What was saved. A `Generation`, whose `metrics` are None, goes on by
      `generate(model, None, config, n, previous=it, sampling=it.sampling, keys=it.keys, verify=it.verify)` as
      one longer call would have.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the folder was not finished, is damaged or no state, or was made with another model or
        configuration, with each field that differs; or the capacity is above the model's positions, or the
        mesh does not divide the state.
    """
    check_whole(capacity=capacity)
    folder = Path(folder)
    about = read_about(folder, KIND)
    config = _checked_config(model, folder, about, config)
    rows, capacity = about["rows"], max(about["capacity"], capacity or 0)
    if about["generation"] is not None:
        rows = max(rows, batch_rows(rows))
    shapes = _shapes(model, config, rows, capacity)
    shardings = returned_shardings(model.config, shapes, jax.sharding.get_mesh())
    targets = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    named = named_arrays(targets)
    arrays = read_arrays(folder, about, named)
    empty = {
        name: jnp.zeros(target.shape, target.dtype, device=target.sharding)
        for name, target in named.items()
        if name not in arrays
    }
    state = jax.tree.unflatten(jax.tree.structure(shapes), [(arrays | empty)[name] for name in named])
    stored = {name: tuple(shape) for name, (_, shape) in about["arrays"].items()}
    if any(stored.get(name, array.shape) != array.shape for name, array in named.items()):
        state = _filled_up(model, config, state, stored, shardings)
    return state if about["generation"] is None else _generation(about["generation"], config, state)


def _shapes(model: Model, config: DecodeConfig, rows: int, capacity: int) -> DecodeState:
    return jax.eval_shape(functools.partial(init_state, model.config, config, rows, capacity))


def _weights(model: Model, config: DecodeConfig) -> dict[str, Array]:
    """The weights that a state depends on: a learned score only where pages are chosen by it."""
    named = named_arrays(model.params)
    return {
        name: array
        for name, array in named.items()
        if config.selects_by_learned or ".page_score." not in name
    }


def _check_budget(config: DecodeConfig, state: DecodeState) -> None:
    """Raises ValueError if no sequence of the state has the budget of the configuration."""
    its, own = to_host((state.budget, Budget.of(config, 1)))
    if not np.any((its.share == own.share) & (its.floor == own.floor)):
        raise ValueError(
            f"the state was made with another budget (a share of {its.share[0]:g}, at least {its.floor[0]} "
            f"tokens; the configuration's are {own.share[0]:g} and {own.floor[0]}); give its configuration"
        )


def _checked_config(
    model: Model, folder: Path, about: Mapping[str, Any], config: DecodeConfig | None
) -> DecodeConfig:
    """The configuration of a saved state.

    Raises:
      ValueError: the state was made with another model or configuration.
    """
    try:
        its_model, saved = from_json(ModelConfig, about["model"]), from_json(DecodeConfig, about["config"])
    except ValueError as error:
        raise ValueError(f"{folder} was made with what is not possible here: {error}") from error
    config = config or saved
    # Names are for messages only, and kernels compute what the reference does.
    ours, theirs = (
        (to_json(replace(sizes, name="")), asdict(replace(decoding, implementation=None)))
        for sizes, decoding in ((model.config, config), (its_model, saved))
    )
    different = [
        f"{name} {has.get(name)!r}, not {wants.get(name)!r}"
        for has, wants in zip(theirs, ours, strict=True)
        for name in {**has, **wants}
        if has.get(name) != wants.get(name)
    ]
    if not different and about["weights"] != fingerprint(_weights(model, config)):
        score = ", or another learned score or none, see load_score" if config.selects_by_learned else ""
        different = [f"the weights of {its_model.name!r}, not those of {model.config.name!r}{score}"]
    if different:
        raise ValueError(
            f"{folder} was made with another model or configuration ({'; '.join(different)}); give those "
            "that it was made with"
        )
    return config


def _filled_up(
    model: Model,
    config: DecodeConfig,
    state: DecodeState,
    stored: Mapping[str, tuple[int, ...]],
    shardings: DecodeState,
) -> DecodeState:
    """The state with what lies beyond the stored shape of each array as in an empty state."""

    def fill(state: DecodeState) -> DecodeState:
        rows, capacity = state.length.shape[0], min(state.capacity, model.config.max_positions)
        empty = init_state(model.config, config, rows, capacity)

        def one(name: str, array: Array, fresh: Array) -> Array:
            before = stored.get(name, array.shape)
            if before == array.shape:
                return array
            there = functools.reduce(
                jnp.logical_and,
                (
                    jax.lax.broadcasted_iota(jnp.int32, array.shape, axis) < size
                    for axis, size in enumerate(before)
                ),
            )
            return jnp.where(there, array, fresh)

        leaves = [
            one(name, array, fresh)
            for (name, array), fresh in zip(named_arrays(state).items(), jax.tree.leaves(empty), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    return jax.jit(fill, donate_argnums=0, out_shardings=shardings)(state)


def _generation_json(result: Generation) -> dict[str, Any]:
    keys = None
    if result.keys is not None:
        data = to_host(jax.random.key_data(result.keys))
        keys = {"kind": str(jax.random.key_impl(result.keys)), "data": data.tolist()}
    return {
        **{name: getattr(result, name) for name in _AS_WRITTEN},
        "pending": np.asarray(result.pending).tolist(),
        "sampling": asdict(result.sampling),
        "keys": keys,
    }


def _generation(values: Mapping[str, Any], config: DecodeConfig, state: DecodeState) -> Generation:
    keys = values["keys"]
    if keys is not None:
        keys = jax.random.wrap_key_data(jnp.array(keys["data"], jnp.uint32), impl=keys["kind"])
    return Generation(
        **{name: values[name] for name in _AS_WRITTEN},
        metrics=None,
        config=config,
        state=state,
        pending=np.array(values["pending"], np.int32),
        sampling=from_json(Sampling, values["sampling"]),
        keys=keys,
    )
