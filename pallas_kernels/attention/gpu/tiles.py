"""The steps of flash attention on the tiles of one stage, for a warpgroup."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import TILE_ROWS
from pallas_kernels.layout import KEYS, VALUES

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of a value per row of a tile."""
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The layout of a value per column of a tile."""
_ROWS_OF_128 = plgpu.Layout.TILED(  # two to a warp, eight neighbours to a thread
    plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_ROWS_OF_64 = plgpu.Layout.TILED(  # two to a warp, four neighbours to a thread
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def join(acc, highest, norm, o_smem, softmax_smem, scale):
    """Joins a running softmax with that of the other warpgroup, which lies in shared memory."""
    other_highest, other_norm = (
        plgpu.load(softmax_smem.at[i], layout=PER_ROW, optimized=False) for i in range(2)
    )
    other_acc = plgpu.load(o_smem, layout=plgpu.Layout.WGMMA, optimized=False)
    both = jnp.maximum(highest, other_highest)
    decay, other_decay = (jnp.exp2((part - both) * scale) for part in (highest, other_highest))
    acc, other_acc = (
        part * lax.broadcast_in_dim(by, acc.shape, [0])
        for part, by in ((acc, decay), (other_acc, other_decay))
    )
    return acc + other_acc, both, norm * decay + other_norm * other_decay


def times_keys(q_smem, stage_smem, pages):
    """Logits of every row for each page's keys: a list of (64, S).

    Keys and values alternate in a stage. A product with the keys of one small page would leave the matrix
    unit idle, so there the product is taken with values too, and their part dropped.
    """
    page_rows = stage_smem.shape[0] // pages
    S = page_rows // 2
    together = S < 32

    def multiply(*products):
        for j, product in enumerate(products):
            operand = stage_smem if together else stage_smem.at[pl.ds(j * page_rows, S)]
            plgpu.wgmma(product, q_smem, operand.transpose((1, 0)))
        return [product[...] for product in products]

    width = page_rows * pages if together else S
    products = pl.run_scoped(
        multiply, *[plgpu.ACC((TILE_ROWS, width), jnp.float32)] * (1 if together else pages)
    )
    if not together:
        return products
    return [lax.slice(products[0], (0, j * page_rows), (TILE_ROWS, j * page_rows + S)) for j in range(pages)]


def add_values(acc, weights, stage_smem, interpret):
    """Adds weights @ values to `acc`; the keys between them get weight 0."""
    S = weights[0].shape[1]
    if len(weights) == 1 and S >= TILE_ROWS:
        return add_product(acc, weights[0], stage_smem.at[pl.ds(S, S)], interpret)
    zero = jnp.zeros_like(weights[0])
    weights = jnp.concatenate([half for part in weights for half in (zero, part)], axis=1)
    return add_product(acc, weights, stage_smem, interpret)


def add_product(acc, weights, operand_smem, interpret):
    """Adds weights @ operand to `acc`, the weights from registers."""
    if interpret:  # which has no wgmma with an operand in registers
        return acc + jnp.dot(weights, operand_smem[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, operand_smem))(plgpu.ACC.init(acc))


def clear_unwritten(stage_smem, ids, newest):
    """Zeroes the rows of a stage that belong to tokens beyond the newest."""
    rows, D = stage_smem.shape
    page_rows = rows // len(ids)
    S = page_rows // 2

    @pl.loop(jnp.int32(0), jnp.int32(rows // TILE_ROWS))
    def _(tile):
        start = pl.multiple_of(tile * TILE_ROWS, TILE_ROWS)
        row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=PER_ROW) + start
        token = lax.rem(row, jnp.int32(S))
        for j, page in enumerate(ids):
            token = jnp.where(lax.div(row, jnp.int32(page_rows)) == j, token + page * S, token)
        written = lax.broadcast_in_dim(token <= newest, (TILE_ROWS, 64), [0])
        for column in range(0, D, 64):  # in pieces, for the sake of registers
            here = stage_smem.at[pl.ds(start, TILE_ROWS), pl.ds(column, 64)]
            values = plgpu.layout_cast(here[...], plgpu.Layout.WGMMA)
            here[...] = jnp.where(written, values, jnp.zeros_like(values))

    plgpu.commit_smem()


def times_codes(q_smem, codes_smem, keys_smem, values_smem, tokens):
    """As `times_keys` of a stage in 8 bits, without its scales; also makes its values ready for a product.

    The matrix unit takes 16 bits, which hold every code: codes are converted in registers and written to
    shared memory, keys and values each together. A step writes keys before its first barrier and values
    before its second, when every warp is done with those of the step before.

    Args:
      q_smem: queries [64, D].
      codes_smem: pages as they lie in the cache [pages * 2 * S, D].
      keys_smem: for the converted keys [pages * S, D].
      values_smem: for the converted values, likewise; 0 for tokens that do not exist.
      tokens: how many each page has, S or more if all.
    """
    S = codes_smem.shape[0] // len(tokens) // 2

    def convert(half, target_smem, tokens):
        parts = [
            _codes(codes_smem.at[pl.ds((2 * j + half) * S, S)], written) for j, written in enumerate(tokens)
        ]
        # At once: a barrier before a store and one behind it keep other work from being done meanwhile.
        target_smem[...] = jnp.concatenate(parts, axis=0).astype(target_smem.dtype)

    all_of_them = [None] * len(tokens)
    convert(KEYS, keys_smem, all_of_them)
    plgpu.commit_smem()

    def multiply(product):
        plgpu.wgmma(product, q_smem, keys_smem.transpose((1, 0)))
        convert(VALUES, values_smem, all_of_them)  # while the matrix unit works
        return product[...]

    product = pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, len(tokens) * S), jnp.float32))
    if codes_smem.dtype != jnp.int8:  # some codes are NaN, and 0 * NaN is NaN
        some_missing = functools.reduce(jnp.logical_or, [written < S for written in tokens])
        pl.when(some_missing)(lambda: convert(VALUES, values_smem, tokens))
    plgpu.commit_smem()
    return [lax.slice(product, (0, j * S), (TILE_ROWS, (j + 1) * S)) for j in range(len(tokens))]


def _codes(codes_smem, written):
    """Codes [S, D] in registers, 0 beyond the first `written`; None: all are."""
    layout = _ROWS_OF_64 if codes_smem.shape[1] == 64 else _ROWS_OF_128
    codes = plgpu.load(codes_smem, layout=layout, optimized=False)
    if codes.dtype != jnp.int8:
        codes = codes.astype(jnp.float32)  # there is no instruction from 8 bits to bfloat16
    if written is not None:
        row = plgpu.broadcasted_iota(jnp.int32, codes.shape, 0, layout=layout)
        codes = jnp.where(row < written, codes, jnp.zeros_like(codes))
    return codes
