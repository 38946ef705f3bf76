"""Products with chosen matrices in plain `jnp`."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def chosen_products(
    x: Float[Array, "X T K"],
    matrices: Float[Array, "E K N"],
    ids: Int[Array, " C"],
    *,
    dtype: Any,
) -> Float[Array, "C T N"]:
    """See `api.chosen_products`."""
    equation = "tk,ckn->ctn" if x.shape[0] == 1 else "ctk,ckn->ctn"
    rows = x[0] if x.shape[0] == 1 else x
    return jnp.einsum(equation, rows, matrices[ids], preferred_element_type=jnp.float32).astype(dtype)
