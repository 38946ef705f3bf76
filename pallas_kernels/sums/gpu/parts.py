"""A sum of parts, added to the residual stream and normed, on Hopper GPUs: a warpgroup for each row.

A row is a few KB, so what takes time is to wait: all that it needs is loaded before anything is computed.
"""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.gpu import DTYPES, kernel
from pallas_kernels.operation import check_supported, operation
from pallas_kernels.sums.gpu.rows import UNIT, Rows, normed, single

MOST_COLUMNS = 8192
"""A thread's share of a row lies in its registers."""


@operation
def add_parts(
    x: Float[Array, "B T M"],
    parts: Float[Array, "S B rows M"],
    post_norm: Float[Array, " M"] | None,
    norm: Float[Array, " M"] | None,
    *,
    eps: float,
    multiplier: float,
    interpret: Any = None,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """See `pallas_kernels.sums.api.add_parts`."""
    B, T, M = x.shape
    check_supported("Mosaic GPU", dtype=(x.dtype, DTYPES))
    if M % UNIT or M > MOST_COLUMNS:
        raise NotImplementedError(
            f"add_parts: {M} columns have no Mosaic GPU kernel (multiples of {UNIT} up to {MOST_COLUMNS})"
        )
    rows = Rows(M)
    by = float(x.dtype.type(multiplier))  # as it is where both are of that dtype
    weights = [weight for weight in (post_norm, norm) if weight is not None]

    def rounded(row):
        return single([values.astype(x.dtype) for values in row])

    def body(
        x_ref,  # [B, T, M]
        parts_ref,  # [S, B, rows, M]
        *refs,  # post_norm[M] and norm[M], then sums[B, T, M] and normed[B, T, M]
    ):
        place = lax.axis_index("sequence"), lax.axis_index("token")
        *weight_refs, sums_ref, normed_ref = refs if norm is not None else (*refs, None)
        found = [rows.load(parts_ref, part, *place) for part in range(parts.shape[0])]
        old = rows.load(x_ref, *place)
        loaded = [rows.load(ref) for ref in weight_refs]
        branch = single(found[0])
        for part in found[1:]:
            branch = [values + more for values, more in zip(branch, single(part), strict=True)]
        branch = rounded(branch)
        if post_norm is not None:
            branch = rounded(normed(branch, loaded[0], eps))
        if multiplier != 1:
            branch = rounded([values * by for values in branch])
        new = rounded([values + more for values, more in zip(single(old), branch, strict=True)])
        rows.store(sums_ref, place, new)
        if norm is not None:
            rows.store(normed_ref, place, normed(new, loaded[-1], eps))

    results = kernel(
        body,
        name="add_parts",
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * (1 if norm is None else 2),
        grid=(B, T),
        grid_names=("sequence", "token"),
        interpret=interpret,
    )(x, parts, *weights)
    return results[0], results[-1]
