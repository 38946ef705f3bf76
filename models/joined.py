"""Matrices that lie in one, so that one product serves them all: query, key and value; gate and up.

The columns of each lie in `ModelConfig.parts` equal parts, and in every part one matrix beside the other. A
device of a mesh has some of the parts: its heads' columns of all matrices, as one piece.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from retro_jax.models.config import ModelConfig


def weight(divided: int | None = None, **options: Any) -> Any:
    """A field of weights, and the axis along which several devices have a part each; None: each has all."""
    return flax.struct.field(metadata={"divided": divided}, **options)


def joined_fields(config: ModelConfig) -> dict[str, dict[str, int]]:
    """By field of the weights of a layer: what lies in it, as checkpoints name it, and its columns."""
    query, pair = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fields = {
        "wqkv": {"wq": query, "wk": pair, "wv": pair},
        "bqkv": {"bq": query, "bk": pair, "bv": pair},
        "w_gate_up": {"w_gate": config.hidden_width, "w_up": config.hidden_width},
    }
    if config.experts is not None:
        width = config.experts.hidden_width
        fields["gate_up"] = {"gate": width, "up": width}
        fields["gate_up_bias"] = {"gate_bias": width, "up_bias": width}
    return fields


def join_columns(
    arrays: Sequence[Float[Array | np.ndarray, "... _"]], parts: int
) -> Float[Array | np.ndarray, "... columns"]:
    """Arrays, of NumPy or JAX, whose columns lie in `parts` parts, those of the first array first in each."""
    namespace = arrays[0].__array_namespace__()
    apart = [array.reshape(*array.shape[:-1], parts, array.shape[-1] // parts) for array in arrays]
    return namespace.concat(apart, axis=-1).reshape(*arrays[0].shape[:-1], -1)


def split_columns(
    joined: Float[Array, "... columns"], widths: Sequence[int], parts: int
) -> tuple[Float[Array, "... _"], ...]:
    """What `join_columns` has joined, or the products with it: one array for each width."""
    # A TPU's compiler would rather have the matrix in parts than the product, and copy it in each step.
    joined = lax.platform_dependent(joined, tpu=lax.optimization_barrier, default=lambda joined: joined)
    by_part = joined.reshape(*joined.shape[:-1], parts, joined.shape[-1] // parts)
    ends = [sum(widths[: index + 1]) // parts for index in range(len(widths))]
    pieces = zip([0, *ends], ends, widths, strict=False)
    return tuple(by_part[..., start:end].reshape(*joined.shape[:-1], width) for start, end, width in pieces)
