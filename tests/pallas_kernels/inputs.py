"""Random inputs of the operations: ragged lengths, NaN wherever nothing was written."""

import numpy as np

PAGES = 12


def random_cache(rng, lengths, page_size, heads=2, dim=8, num_pages=PAGES):
    """`pages`[B, K, P, 2, S, D] that hold `lengths` tokens; the rest is NaN."""
    pages = rng.standard_normal((len(lengths), heads, num_pages, 2, page_size, dim)).astype(np.float32)
    position = np.arange(num_pages * page_size).reshape(num_pages, page_size)
    beyond = position >= np.asarray(lengths)[:, None, None]
    pages[np.broadcast_to(beyond[:, None, :, None, :, None], pages.shape)] = np.nan
    return pages


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
