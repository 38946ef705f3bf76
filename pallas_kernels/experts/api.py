"""Public function of products with chosen matrices."""

from typing import Any

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.experts import reference
from pallas_kernels.experts.gpu import kernels as mosaic_gpu


def chosen_products(
    x: Float[Array, "X T K"],
    matrices: Float[Array, "E K N"],
    ids: Int[Array, " C"],
    *,
    dtype: Any,
    implementation: str | None = None,
) -> Float[Array, "C T N"]:
    """Products of few rows with each of some matrices: x[c] @ matrices[ids[c]].

    A kernel reads only the matrices that are asked for, and each once. Several devices need each to have its
    own part of everything: call it within `shard_map`.

    Args:
      x: rows, the same for all matrices where X is 1, or else C times T of them.
      matrices: E of them.
      ids: the matrix of each product; -1 for one that is not asked for, whose result has no meaning.
      dtype: of the result; sums are float32.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: x is neither one nor one for each product.
    """
    if x.shape[0] not in (1, ids.shape[0]):
        raise ValueError(
            f"x has rows for {x.shape[0]} products; give those of all in one, or {ids.shape[0]}, one for each"
        )
    return dispatch(
        "chosen_products",
        implementation,
        {"xla": reference.chosen_products, "mosaic_gpu": mosaic_gpu.chosen_products},
        ((P(), P(), P()), P()),
        x,
        matrices,
        ids,
        dtype=dtype,
    )
