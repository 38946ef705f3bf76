"""From named tensors of a checkpoint to `Params`: all names and shapes are checked, then each is read."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from retro_jax.models.config import ModelConfig
from retro_jax.models.experts import ExpertParams
from retro_jax.models.joined import join_columns, joined_fields, split_columns
from retro_jax.models.transformer import LayerParams, Params, random_params

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); stage is "download" (bytes) or "load" (tensors)."""


def load_params(
    config: ModelConfig,
    table: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
    problems: Collection[str] = (),
    lost: Collection[str] = (),
    progress: Progress | None = None,
    norm_offset: float = 0.0,
) -> Params:
    """Checks every tensor of a checkpoint against the configuration, then reads and converts them one by one.

    Checkpoints store a matrix as (out, in), except the embedding, so all others are transposed. Besides the
    finished weights, the tensors of one of them are held at a time, be they those of all experts.

    Args:
        config: what the weights must fit; its dtype is what they are converted to.
        table: parameter path, with {i} for the layer, to the checkpoint's name, with {i} as well, and with
            {e} where each expert's weight is a tensor of its own. Matrices that lie in one have one name if
            they do so in the checkpoint, rows of one after another's.
        shapes: shape of every tensor in the checkpoint, as it is stored.
        read: reads one tensor by the checkpoint's name.
        source: the checkpoint, for messages.
        problems: what was found wrong with the checkpoint already; reported together with the rest.
        lost: names of tensors already covered by `problems`.
        progress: called with ("load", tensors done, tensors).
        norm_offset: what is added to the stored weights of norms.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor at once.
    """
    joined = joined_fields(config)
    stored_joined = {field for field in joined if f"layers.{{i}}.{field}" in table}
    targets = jax.eval_shape(
        lambda: separate_weights(random_params(config, jax.random.key(0)), config, stored_joined)
    )
    names = {path: _names(checkpoint_name(table, path), config) for path in targets}
    wanted = {}
    for path, target in targets.items():
        shape = (*target.shape[:-2], *target.shape[-2:][::-1]) if _is_turned(path) else target.shape
        wanted |= dict.fromkeys(names[path], shape if len(names[path]) == 1 else shape[1:])
    problems = [*problems, *_mismatches(wanted, shapes, lost)]
    if problems:
        raise ValueError(
            f"{source} does not match the configuration of {config.name}, {len(problems)} problems:\n  "
            + "\n  ".join(problems)
        )
    done = itertools.count(1)

    def tensor(name: str) -> np.ndarray:
        array = read(name)
        if progress:
            progress("load", next(done), len(wanted))
        return array

    def stored(path: str) -> np.ndarray:
        arrays = [tensor(name) for name in names[path]]
        array = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        if norm_offset and path.endswith("norm"):
            return array.astype(np.float32) + np.float32(norm_offset)
        return array

    def weight(path: str) -> Array | None:
        """The weight of a path, None if the model has none."""
        holder, _, field = path.rpartition(".")
        widths = joined.get(field, {})
        paths = [path] if path in targets else [f"{holder}.{part}" for part in widths]
        if not paths or not {*paths} <= targets.keys():
            return None
        turn = _turn if _is_turned(path) else lambda array: array
        if widths:
            columns = [turn(stored(path)) for path in paths]
            if field in stored_joined:
                columns = np.split(columns[0], np.cumsum([*widths.values()])[:-1], axis=-1)
            array = turn(join_columns(columns, config.parts))
        else:
            array = stored(path)
        return turn(jnp.array(array)).astype(targets[paths[0]].dtype)

    def weights(of: type, prefix: str, **others: Any) -> Any:
        fields = [field.name for field in dataclasses.fields(of) if field.name not in others]
        return of(**{field: weight(prefix + field) for field in fields}, **others)

    def layer(index: int) -> LayerParams:
        prefix = f"layers.{index}."
        chosen = config.layers[index].mlp == "experts"
        experts = weights(ExpertParams, f"{prefix}experts.") if chosen else None
        return weights(LayerParams, prefix, experts=experts)

    return Params(
        embed=weight("embed"),
        layers=tuple(map(layer, range(config.num_layers))),
        final_norm=weight("final_norm"),
        head=weight("head"),
    )


def _names(name: str, config: ModelConfig) -> list[str]:
    """The tensors of a weight: one, or one of each expert."""
    return [name.replace("{e}", str(e)) for e in range(config.experts.count)] if "{e}" in name else [name]


def _is_turned(path: str) -> bool:
    """Whether checkpoints store the weight with its last two axes exchanged, if it has two."""
    return path != "embed" and not path.endswith("_bias")


def _turn(array: Array | np.ndarray) -> Array | np.ndarray:
    return array.swapaxes(-1, -2) if array.ndim > 1 else array


def separate_weights(
    params: Params, config: ModelConfig, joined_too: Collection[str] = ()
) -> dict[str, Array]:
    """Weights by the paths that checkpoints have names for (`Family.names`).

    Those that lie in one are apart, or, of fields in `joined_too`, the columns of one after another's.
    """
    joined, separate = joined_fields(config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        holder, _, field = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
        prefix = holder and f"{holder}."
        if field in joined:
            columns = split_columns(leaf, [*joined[field].values()], config.parts)
            if field in joined_too:
                separate[prefix + field] = jnp.concatenate(columns, axis=-1)
            else:
                separate |= {prefix + name: array for name, array in zip(joined[field], columns, strict=True)}
        else:
            separate[prefix + field] = leaf
    return separate


def checkpoint_name(table: Mapping[str, str], path: str) -> str:
    """What a checkpoint calls the weight of a path, by a table of names with {i} for the layer.

    Where it has a tensor of each expert, {e} is left in.
    """
    layer = re.search(r"\d+", path)
    if layer is None:
        return table[path]
    return table[path.replace(layer[0], "{i}", 1)].replace("{i}", layer[0])


def _mismatches(
    wanted: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], lost: Collection[str]
) -> list[str]:
    missing = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in {*shapes, *lost}]
    unexpected = [f"unexpected: {name} {shapes[name]}" for name in shapes if name not in wanted]
    misshapen = [
        f"wrong shape: {name} is {shapes[name]}, the configuration needs {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    return missing + unexpected + misshapen
