"""Page update on Hopper GPUs, in place and in one launch: a warpgroup per sequence, KV head and touched page.

Each thread owns channels of the page: it writes the new keys and values there and reduces the page's keys to
the statistics, without shared memory but for the largest magnitude of a vector that is kept in 8 bits. Keys
and values in 8 bits are made of those that are written, and statistics of the numbers that keys stand for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.gpu import check_support, kernel, row_layout
from pallas_kernels.layout import KEYS, VALUES
from pallas_kernels.operation import operation
from pallas_kernels.pages import Pages, QuantizedPages, in_codes, largest_code
from pallas_kernels.statistics import INT8_MAX, STATISTICS, Statistics, in_units

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
    B, T, K, D = k.shape
    P, _, S = pages.shape[2:5]
    eight = isinstance(pages, QuantizedPages)
    check_support(k.dtype if eight else pages.dtype, D, S)
    if T > MAX_TOKENS:
        raise NotImplementedError(
            f"update_pages: {T} tokens are more than the Mosaic GPU kernel's {MAX_TOKENS}"
        )
    touched = (T + S - 2) // S + 1
    layout = row_layout(D)
    statistic = None if statistics is None else STATISTICS[statistics.kind]
    parts = statistic.parts if statistic else ()

    def body(
        new_ref,  # [B, T, 2 * K, D], keys, then values
        start_ref,  # [B]
        write_ref,  # [B, T]
        pages_ref,  # [B, K, P, 2, S, D]
        *refs,
    ):
        refs = iter(refs)
        page_scales_ref = next(refs) if eight else None  # [B, K, P, 2, S]
        statistics_ref = next(refs) if parts else None  # [B, K, P, Z, D]
        scales_ref = next(refs, None)  # [B, K, P, Z], of 8-bit statistics
        b, head, index = (lax.axis_index(axis) for axis in ("sequence", "head", "page"))
        start = start_ref[b]
        written = jnp.int32(0)
        for t in range(T):
            written |= write_ref[b, t].astype(jnp.int32) << t
        end = start + 32 - lax.clz(written)
        page = lax.div(start + P * S, jnp.int32(S)) - P + index  # rounds down where start is negative
        first = page * S

        def vector(ref, *place):
            return plgpu.load(ref.at[place], layout=layout, optimized=False)

        def kept(token):
            if not eight:
                return token, None
            token = token.astype(jnp.float32)
            scale = jnp.max(jnp.abs(token)) / largest_code(pages.dtype)
            return in_codes(token, scale, pages.dtype), scale

        def number(token, scale):
            return token if scale is None else token.astype(jnp.float32) * scale

        @pl.when((written != 0) & (page >= 0) & (first < end))
        def _():
            old = []
            for row in range(S if parts else 0):
                key = vector(pages_ref, b, head, page, KEYS, row)
                old.append((key, page_scales_ref[b, head, page, KEYS, row] if eight else None))
            new = []
            for t in range(T):
                row = start + t - first
                here = (row >= 0) & (row < S) & (written >> t & 1 == 1)
                new.append((row, here, vector(new_ref, b, t, head), vector(new_ref, b, t, K + head)))
            new = [(row, here, kept(key), kept(value)) for row, here, key, value in new]
            for row, here, *both in new:

                @pl.when(here)
                def _(row=row, both=both):
                    for half, (token, scale) in zip((KEYS, VALUES), both, strict=True):
                        pages_ref[b, head, page, half, row] = token
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
            for z, value in enumerate([part.of_tokens(keys) for part in parts]):
                if statistic.quantized:
                    scale = jnp.max(jnp.abs(value)) / INT8_MAX
                    scales_ref[b, head, page, z] = scale
                    value = in_units(value, scale)
                statistics_ref[b, head, page, z] = value.astype(statistics_ref.dtype)

    launch = kernel(
        body,
        name="update_pages",
        out_type=[],
        grid=(B, K, touched),
        grid_names=("sequence", "head", "page"),
        interpret=interpret,
    )
    arrays, structure = jax.tree.flatten((pages, statistics))
    state = [jax.new_ref(array) for array in arrays]
    new = jnp.concatenate([k, v], axis=2)  # what makes them, XLA then does in one launch
    launch(new if eight else new.astype(pages.dtype), start, write, *state)
    return jax.tree.unflatten(structure, [ref[...] for ref in state])
