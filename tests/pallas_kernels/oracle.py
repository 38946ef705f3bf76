"""The operations once more in NumPy float64, token by token: what every implementation is compared with."""

import numpy as np


def attend(q, k, v):
    """Softmax attention of q[D] over k, v[T, D]: output and log-sum-exp; (0, -inf) over nothing."""
    if not len(k):
        return np.zeros(q.shape), -np.inf
    scores = k.astype(np.float64) @ q.astype(np.float64) / np.sqrt(len(q))
    highest = scores.max()
    weights = np.exp(scores - highest)
    return weights @ v.astype(np.float64) / weights.sum(), highest + np.log(weights.sum())


def merge(o_a, lse_a, o_b, lse_b):
    """Attention over the union of two disjoint sets of keys."""
    if np.isneginf(lse_a) and np.isneginf(lse_b):
        return o_a, lse_a
    lse = np.logaddexp(lse_a, lse_b)
    return np.exp(lse_a - lse) * o_a + np.exp(lse_b - lse) * o_b, lse


def tokens_of(pages, head, ids, limit):
    """Keys and values [T, D] of one sequence's `pages`[K, P, 2, S, D] in `ids`, up to position `limit`."""
    size = pages.shape[3]
    places = [(page, offset) for page in ids for offset in range(size) if page * size + offset <= limit]
    k = np.array([pages[head, page, 0, offset] for page, offset in places]).reshape(-1, pages.shape[-1])
    v = np.array([pages[head, page, 1, offset] for page, offset in places]).reshape(-1, pages.shape[-1])
    return k, v


def retro_attention(q, pages, page_ids, counts, last_loaded, positions, cached_o, cached_lse):
    """As `pallas_kernels.retro_attention`."""
    B, W, N, D = q.shape
    group = N // pages.shape[1]
    o, lse, loaded = np.zeros((B, W, N, D)), np.zeros((B, W, N)), last_loaded.copy()
    for b in range(B):
        for n in range(N):
            head = n // group
            selected = page_ids[b, head, : counts[b, head]]
            for w in range(W):
                visible = [page for page in selected if last_loaded[b, head, page] < positions[b, w]]
                result = attend(q[b, w, n], *tokens_of(pages[b], head, visible, positions[b, w]))
                if w < W - 1:
                    result = merge(*result, cached_o[b, w, n], cached_lse[b, w, n])
                o[b, w, n], lse[b, w, n] = result
            loaded[b, head, selected] = positions[b, -1]
    return o, lse, loaded


def dense_attention(q, pages, positions):
    """As `pallas_kernels.dense_attention`."""
    B, T, N, _ = q.shape
    group = N // pages.shape[1]
    o = np.zeros(q.shape)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                ids = range(pages.shape[2])
                o[b, t, n] = attend(q[b, t, n], *tokens_of(pages[b], n // group, ids, positions[b, t]))[0]
    return o


def statistics(keys, kind):
    """The statistics [Z, D] of a page's written keys [T, D]."""
    if kind == "min_max":
        return np.stack([keys.min(axis=0), keys.max(axis=0)])
    return keys.mean(axis=0, keepdims=True, dtype=np.float64)


def page_score(q, vectors, score):
    """The score of a page with statistics `vectors`[Z, D] for one query head q[D]."""
    if score == "bounds":
        return np.maximum(q * vectors[0], q * vectors[1]).sum()
    return q @ vectors[0]
