"""Random inputs of the operations: ragged lengths, NaN wherever nothing was written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import CODES, STATISTICS, QuantizedPages, quantize
from pallas_kernels.experts.reference import choose

PAGES = 12


def shapes_of_statistics(kind, pages, dim, dtype=jnp.bfloat16):
    """Statistics of pages [B, K, P], as shapes; None for no kind."""
    dtype = jnp.dtype(dtype).name
    return kind and jax.eval_shape(functools.partial(STATISTICS[kind].zeros, pages, dim, dtype))


def random_statistics(rng, lengths, page_size, heads, pages, kind, dim, dtype):
    """Statistics of sequences of `lengths` tokens: some pages alike, NaN beyond the newest."""
    vectors = STATISTICS[kind].vectors
    values = np.sort(rng.standard_normal((len(lengths), heads, pages, vectors, dim)), axis=3)
    alike = pages // 5
    values[:, :, alike : 2 * alike] = values[:, :, 2 * alike : 3 * alike]
    for b, length in enumerate(lengths):
        values[b, :, -(-length // page_size) :] = np.nan
    return STATISTICS[kind].keep(jnp.asarray(values, dtype))


def random_update(rng, lengths, tokens, page_size, heads, dim, kind, dtype, num_pages=PAGES):
    """Arguments of `update_pages` whose last token is the sequence's last; NaN where none is written.

    Args:
      rng: random numbers.
      lengths: of the sequences.
      tokens: to write.
      page_size: S.
      heads: K.
      dim: D.
      kind: of statistics, or None.
      dtype: of pages; see `dtype_beside` for that of tokens and statistics.
      num_pages: P.
    """
    start = np.asarray(lengths, np.int32) - tokens
    write = start[:, None] + np.arange(tokens) >= 0
    k, v = rng.standard_normal((2, len(lengths), tokens, heads, dim))
    k[~write], v[~write] = np.nan, np.nan
    pages = random_cache(rng, lengths, page_size, heads, dim, num_pages)
    statistics = None
    if kind:
        values = rng.standard_normal((*pages.shape[:3], STATISTICS[kind].vectors, dim))
        statistics = STATISTICS[kind].keep(jnp.asarray(values, dtype_beside(dtype)))
    k, v = (jnp.asarray(array, dtype_beside(dtype)) for array in (k, v))
    return [pages_as(pages, dtype), statistics, k, v, jnp.asarray(start), jnp.asarray(write)]


def random_product(rng, lengths, tokens, page_size, group, dim, kind, dtype, made, num_pages=PAGES, heads=4):
    """Arguments of `update_from_product` and its options; NaN where no token is written, but for queries.

    `made` names what there is: "bias", "norms", "rope", and "scale" of queries. Where there is something the
    product is in parts, with a row more than tokens. See `random_update`.
    """
    pages, statistics, k, v, start, write = random_update(
        rng, lengths, tokens, page_size, heads, dim, kind, dtype, num_pages
    )
    B, part_heads = len(lengths), 2
    q = jnp.asarray(rng.standard_normal((B, tokens, heads * group, dim)), k.dtype)
    by_part = [x.reshape(B, tokens, heads // part_heads, -1, dim) for x in (q, k, v)]
    product = jnp.concatenate(by_part, axis=3).reshape(1, B, tokens, -1)
    if made:
        parts = jnp.asarray(rng.standard_normal((2, *product.shape[1:])), jnp.float32)
        product = jnp.concatenate([parts, product.astype(jnp.float32) - parts.sum(axis=0)])
        product = jnp.pad(product, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=jnp.nan)

    def floats(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    angles = 9 * floats(B, tokens, dim // 2)
    arrays = (
        floats(product.shape[3]).astype(k.dtype) if "bias" in made else None,
        *((1 + 0.1 * floats(dim), 1 - 0.1 * floats(dim)) if "norms" in made else (None, None)),
        *((jnp.cos(angles), jnp.sin(angles)) if "rope" in made else (None, None)),
    )
    options = {
        "part_heads": part_heads,
        "norm_eps": 1e-6,
        "q_scale": 0.75 if "scale" in made else 1.0,
        "dtype": k.dtype,
    }
    return [pages, statistics, product, *arrays, start, write], options


def random_cache(rng, lengths, page_size, heads=2, dim=8, num_pages=PAGES):
    """`pages`[B, K, P, 2, S, D] that hold `lengths` tokens; the rest is NaN."""
    pages = rng.standard_normal((len(lengths), heads, num_pages, 2, page_size, dim)).astype(np.float32)
    position = np.arange(num_pages * page_size).reshape(num_pages, page_size)
    beyond = position >= np.asarray(lengths)[:, None, None]
    pages[np.broadcast_to(beyond[:, None, :, None, :, None], pages.shape)] = np.nan
    return pages


def pages_as(pages, dtype):
    """Pages in a dtype; in one of `CODES` they get scales, which are NaN wherever pages are."""
    name = jnp.dtype(dtype).name
    return QuantizedPages(*quantize(jnp.asarray(pages), name)) if name in CODES else jnp.asarray(pages, dtype)


def dtype_beside(dtype):
    """The dtype of queries, keys and values beside pages in a dtype."""
    return jnp.bfloat16 if jnp.dtype(dtype).name in CODES else dtype


def window_positions(lengths, window):
    """Positions of the last `window` tokens, -1 before the beginning."""
    return np.maximum(np.asarray(lengths)[:, None] - window + np.arange(window), -1).astype(np.int32)


def random_retro_inputs(rng, lengths, window, group, page_size, heads=2, dim=8, num_pages=PAGES, places=5):
    """Arguments of `retro_attention`: ragged counts, a history of loads, a partly empty output cache."""
    B = len(lengths)
    pages = random_cache(rng, lengths, page_size, heads, dim, num_pages)
    positions = window_positions(lengths, window)
    page_ids = np.full((B, heads, places), 10**6, np.int32)  # what is not selected may hold anything
    counts = np.zeros((B, heads), np.int32)
    for b, length in enumerate(lengths):
        used = -(-length // page_size)
        for head in range(heads):
            counts[b, head] = rng.integers(0, min(used, places) + 1)
            page_ids[b, head, : counts[b, head]] = rng.permutation(used)[: counts[b, head]]
    newest = positions[:, -1, None, None]
    last_loaded = rng.integers(newest - 2 * window, newest, (B, heads, num_pages)).clip(-1).astype(np.int32)
    shape = (B, window - 1, heads * group)
    cached_lse = np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape)).astype(np.float32)
    cached_o = rng.standard_normal((*shape, dim)).astype(np.float32)
    cached_o[np.isneginf(cached_lse)] = 0
    q = rng.standard_normal((B, window, heads * group, dim)).astype(np.float32)
    return q, pages, page_ids, counts, last_loaded, positions, cached_o, cached_lse


def silu(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def bounded(gate, up):
    return jnp.minimum(gate, 0.5) * jax.nn.sigmoid(1.7 * gate) * (jnp.clip(up, -0.5, 0.5) + 1)


def random_experts(rng, rows, width, hidden, experts, per_token, biased, valid, dtype):
    """Arguments of a mixture of experts, and how many are read.

    Rows that do not count are NaN, and so is what no other row chooses.
    """
    valid = jnp.asarray(valid)
    h, router = rng.standard_normal((rows, width)), rng.standard_normal((width, experts)) * width**-0.5
    gate_up = rng.standard_normal((experts, width, 2 * hidden)) * width**-0.5
    down = rng.standard_normal((experts, hidden, width)) * hidden**-0.5
    biases = [
        0.3 * rng.standard_normal(shape) for shape in (experts, (experts, 2 * hidden), (experts, width))
    ]
    h, router, router_bias = (jnp.asarray(array, dtype) for array in (h, router, biases[0]))
    _, chosen = choose(h, router, router_bias if biased else None, valid, per_token, True)
    read = np.asarray(chosen).any(0)
    for array in (gate_up, down, *biases[1:]):
        array[~read] = np.nan
    h = jnp.where(valid[:, None], h, jnp.nan)
    weights = [jnp.asarray(array, dtype) for array in (gate_up, down)]
    biases = [router_bias, *(jnp.asarray(bias, dtype) for bias in biases[1:])] if biased else [None] * 3
    return (h, router, *weights, *biases, valid), int(read.sum())


def random_parts(rng, batch, tokens, width, parts, post_norm, norm, dtype):
    """Arguments of `add_parts`: several parts in float32, NaN in rows that are none of the stream's."""
    rows = tokens + (batch == tokens == 1 < parts)  # as a single row comes in a product's parts
    x = jnp.asarray(rng.standard_normal((batch, tokens, width)), dtype)
    made = rng.standard_normal((parts, batch, rows, width))
    made[:, :, tokens:] = np.nan
    weights = [jnp.asarray(rng.uniform(0.5, 2, width), dtype) if each else None for each in (post_norm, norm)]
    return x, jnp.asarray(made, dtype if parts == 1 else jnp.float32), *weights
