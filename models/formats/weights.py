"""From named tensors of a checkpoint to `Params`: all names and shapes are checked, then each is read."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from retro_jax.models.config import ModelConfig
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
) -> Params:
    """Checks every tensor of a checkpoint against the configuration, then reads and converts them one by one.

    Checkpoints store a matrix as (out, in), except the embedding, so all others are transposed. Besides the
    finished weights, one tensor is held at a time.

    Args:
        config: what the weights must fit; its dtype is what they are converted to.
        table: parameter path, with {i} for the layer, to the checkpoint's name, with {i} as well.
        shapes: shape of every tensor in the checkpoint, as it is stored.
        read: reads one tensor by the checkpoint's name.
        source: the checkpoint, for messages.
        problems: what was found wrong with the checkpoint already; reported together with the rest.
        lost: names of tensors already covered by `problems`.
        progress: called with ("load", tensors done, tensors).

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor at once.
    """
    targets = jax.eval_shape(lambda: _by_path(random_params(config, jax.random.key(0))))
    names = {path: _checkpoint_name(table, path) for path in targets}
    wanted = {
        names[path]: target.shape if path == "embed" else target.shape[::-1]
        for path, target in targets.items()
    }
    problems = [*problems, *_mismatches(wanted, shapes, lost)]
    if problems:
        raise ValueError(
            f"{source} does not match the configuration of {config.name}, {len(problems)} problems:\n  "
            + "\n  ".join(problems)
        )
    arrays = {}
    for path, name in names.items():
        stored = jnp.array(read(name))
        arrays[path] = (stored if path == "embed" else stored.T).astype(config.dtype)
        if progress:
            progress("load", len(arrays), len(names))
    fields = [field.name for field in dataclasses.fields(LayerParams)]
    return Params(
        embed=arrays["embed"],
        layers=tuple(
            LayerParams(**{field: arrays.get(f"layers.{layer}.{field}") for field in fields})
            for layer in range(config.num_layers)
        ),
        final_norm=arrays["final_norm"],
        head=arrays.get("head"),
    )


def _by_path(params: Params) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checkpoint_name(table: Mapping[str, str], path: str) -> str:
    layer = re.search(r"\d+", path)
    if layer is None:
        return table[path]
    return table[path.replace(layer[0], "{i}", 1)].format(i=layer[0])


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
