"""Page update on Hopper GPUs, in place and in one launch: a warpgroup per sequence, KV head and touched page.

Each thread owns channels of the page: it writes the new keys and values there and reduces the page's keys to
the statistics, without shared memory but for what is taken over a whole vector. Keys and values in 8 bits are
made of those that are written, and statistics of the numbers that keys stand for.

Of a joined product it makes the keys and values that it writes, and further warpgroups make a query each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.gpu import DTYPES, check_support, kernel
from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import check_supported, operation
from pallas_kernels.pages import Pages, QuantizedPages, in_codes, largest_code
from pallas_kernels.statistics import INT8_MAX, STATISTICS, Statistics, in_units
from pallas_kernels.update.gpu.vectors import Product, Vectors, largest

MAX_TOKENS = 32
"""Tokens of one update, the bits of the word that says which of them are written."""


@operation
def update_pages(
    pages: Pages,
    statistics: Statistics | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    interpret: Any = None,
) -> tuple[Pages, Statistics | None]:
    """See `pallas_kernels.update.api.update_pages`."""
    eight = isinstance(pages, QuantizedPages)
    _check(k.dtype if eight else pages.dtype, pages, k.shape[1])
    new = jnp.concatenate([k, v], axis=2)  # what makes them, XLA then does in one launch
    new = new if eight else new.astype(pages.dtype)
    options = {"dtype": new.dtype, "interpret": interpret}
    return _update(pages, statistics, new[None], [None] * 5, start, write, **options)[1:]


@operation
def update_from_product(
    pages: Pages,
    statistics: Statistics | None,
    product: Float[Array, "parts B rows QKV"],
    bias: Float[Array, " QKV"] | None,
    q_norm: Float[Array, " D"] | None,
    k_norm: Float[Array, " D"] | None,
    cos: Float[Array, "B T half"] | None,
    sin: Float[Array, "B T half"] | None,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    part_heads: int,
    norm_eps: float,
    q_scale: float,
    dtype: Any,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N D"], Pages, Statistics | None]:
    """See `pallas_kernels.update.api.update_from_product`."""
    D = pages.shape[-1]
    _check(dtype, pages, write.shape[1])
    if not isinstance(pages, QuantizedPages):
        check_supported("Mosaic GPU", dtype=(pages.dtype, DTYPES))
    if cos is not None and 2 * cos.shape[-1] != D:
        raise NotImplementedError(
            f"update_from_product: {2 * cos.shape[-1]} rotated channels of head_dim {D}; the Mosaic GPU "
            "kernel rotates all or none"
        )
    heads = product.reshape(*product.shape[:3], -1, D)
    made = [None if bias is None else bias.reshape(-1, D), q_norm, k_norm, cos, sin]
    options = {
        "part_heads": part_heads,
        "norm_eps": norm_eps,
        "q_scale": q_scale,
        "dtype": dtype,
        "interpret": interpret,
    }
    return _update(pages, statistics, heads, made, start, write, **options)


def _check(dtype, pages, tokens):
    """Raises `NotImplementedError` for what the kernel does not support."""
    S, D = pages.shape[-2:]
    check_support(dtype, D, S)
    if tokens > MAX_TOKENS:
        raise NotImplementedError(
            f"update_pages: {tokens} tokens are more than the Mosaic GPU kernel's {MAX_TOKENS}"
        )


def _update(
    pages,
    statistics,
    heads,
    made,
    start,
    write,
    *,
    dtype,
    part_heads=None,
    norm_eps=0.0,
    q_scale=1.0,
    interpret=None,
):
    """Writes the keys and values among `heads`, and makes the queries if there are any among them.

    Args:
      pages: see `update_pages`, as `statistics`, `start` and `write`.
      statistics: of the pages.
      heads: [parts, B, rows, heads, D], parts of sums: queries of `part_heads` KV heads, their keys, their
        values, then those of others.
      made: bias[heads, D], q_norm, k_norm, cos and sin, as for `update_from_product`.
      start: of the tokens.
      write: which of them to write.
      dtype: of what the parts add up to, and of the queries.
      part_heads: None: all.
      norm_eps: of the norms.
      q_scale: of the queries.
      interpret: see `pallas_kernels.gpu.kernel`.

    Returns:
      q[B, T, N, D], None without any; pages; statistics.
    """
    (B, T), (columns, D) = write.shape, heads.shape[3:]
    K, P, _, S = pages.shape[1:5]
    part_heads = part_heads or K
    group = columns // K - 2  # 0: no queries
    eight = isinstance(pages, QuantizedPages)
    touched = (T + S - 2) // S + 1
    vectors = Vectors(D, 1 if made[-1] is None else 2)
    statistic = None if statistics is None else STATISTICS[statistics.kind]
    parts = statistic.parts if statistic else ()

    def body(
        heads_ref,  # [parts, B, rows, heads, D]
        start_ref,  # [B]
        write_ref,  # [B, T]
        *refs,
    ):
        refs = iter(refs)
        bias_ref, q_norm_ref, k_norm_ref, cos_ref, sin_ref = (
            None if array is None else next(refs) for array in made
        )
        pages_ref = next(refs)  # [B, K, P, 2, S, D]
        page_scales_ref = next(refs) if eight else None  # [B, K, P, 2, S]
        statistics_ref = next(refs) if parts else None  # [B, K, P, Z, D]
        scales_ref = next(refs) if parts and statistic.quantized else None  # [B, K, P, Z]
        q_ref = next(refs, None)  # [B, T, N, D]
        product = Product(vectors, dtype, heads_ref, bias_ref, cos_ref, sin_ref, norm_eps)
        b, head, index = (lax.axis_index(axis) for axis in ("sequence", "head", "task"))
        place = lax.rem(head, jnp.int32(part_heads))
        part = (head - place) * (group + 2)  # where its queries begin

        if group:

            @pl.when(index >= touched)
            def _():
                t, g = (of(index - touched, jnp.int32(group)) for of in (lax.div, lax.rem))
                q = product.vector(b, t, part + place * group + g, q_norm_ref, q_scale, turn=True)
                vectors.store(q_ref, (b, t, head * group + g), q)

        start = start_ref[b]
        written = jnp.int32(0)
        for t in range(T):
            written |= write_ref[b, t].astype(jnp.int32) << t
        end = start + 32 - lax.clz(written)
        page = lax.div(start + P * S, jnp.int32(S)) - P + index  # rounds down where start is negative
        first = page * S

        def kept(token):
            if not eight:
                return [values.astype(pages.dtype) for values in token], None
            token = [values.astype(jnp.float32) for values in token]
            scale = largest(token) / largest_code(pages.dtype)
            return [in_codes(values, scale, pages.dtype) for values in token], scale

        def number(token, scale):
            return token if scale is None else [values.astype(jnp.float32) * scale for values in token]

        @pl.when((index < touched) & (written != 0) & (page >= 0) & (first < end))
        def _():
            old = []
            for row in range(S if parts else 0):
                key = vectors.load(pages_ref, b, head, page, KEYS, row)
                old.append((key, page_scales_ref[b, head, page, KEYS, row] if eight else None))
            new = []
            for t in range(T):
                row = start + t - first
                here = (row >= 0) & (row < S) & (written >> t & 1 == 1)
                column = part + part_heads * group + place
                key = product.vector(b, t, column, k_norm_ref, turn=True)
                value = product.vector(b, t, column + part_heads)
                new.append((row, here, kept(key), kept(value)))
            for row, here, *both in new:

                @pl.when(here)
                def _(row=row, both=both):
                    for half, (token, scale) in zip((KEYS, VALUES), both, strict=True):
                        vectors.store(pages_ref, (b, head, page, half, row), token)
                        if eight:
                            page_scales_ref[b, head, page, half, row] = scale

            if not parts:
                return
            keys = []
            for row, key in enumerate(old):
                age = first + row - start
                over = (age >= 0) & (age < T) & (written >> jnp.clip(age, 0, T - 1) & 1 == 1)
                keys.append((number(*key), (first + row < end) & ~over))
            keys += [(number(*key), here) for _, here, key, _ in new]
            for z, part_of in enumerate(parts):
                value = [
                    part_of.of_tokens([(key[piece], here) for key, here in keys])
                    for piece in range(vectors.pieces)
                ]
                if statistic.quantized:
                    scale = largest(value) / INT8_MAX
                    scales_ref[b, head, page, z] = scale
                    value = [in_units(values, scale) for values in value]
                vectors.store(statistics_ref, (b, head, page, z), value)

    launch = kernel(
        body,
        name="update_pages",
        out_type=[jax.ShapeDtypeStruct((B, T, K * group, D), dtype)] if group else [],
        grid=(B, K, touched + T * group),
        grid_names=("sequence", "head", "task"),
        interpret=interpret,
    )
    arrays, structure = jax.tree.flatten((pages, statistics))
    state = [jax.new_ref(array) for array in arrays]
    q = launch(heads, start, write, *(array for array in made if array is not None), *state)
    return q[0] if group else None, *jax.tree.unflatten(structure, [ref[...] for ref in state])
