"""Whether two selections of pages are the same choice, where their scores come from two arithmetics.

Sums of the same terms in another order, or by other instructions, differ by rounding: a page whose score lies
within rounding of the last one chosen may be chosen in its place. No other page may.
"""

import itertools

import numpy as np

ROUNDING = 4e-6
"""Of a score, over the sum of its terms' sizes: 64 times what one float32 sum rounds by, 2 ** -24."""


def distance(got, expected, scores, sizes, forced=()):
    """How far from the last page chosen any page lies that is in one of the two sets only.

    Args:
      got: the pages chosen, in any order.
      expected: those of the definition.
      scores: of every page[P], float64.
      sizes: what the rounding of each page's score is proportional to, [P].
      forced: pages that are chosen whatever their score.

    Returns:
      The largest distance of scores over sizes: 0 for equal sets only; infinity for what rounding cannot do:
      another number of pages, a page twice, a forced page left out, or a page without a finite score.
    """
    got, expected, forced = list(map(int, got)), set(map(int, expected)), set(forced)
    differ = set(got) ^ expected
    if not differ and len(got) == len(expected):
        return 0.0
    if len(got) != len(expected) or len(set(got)) != len(got) or differ & forced:
        return np.inf
    if not all(0 <= page < len(scores) and np.isfinite(scores[page]) for page in differ):
        return np.inf
    last = min(expected - forced, key=lambda page: scores[page])
    if not np.isfinite(scores[last]):
        return np.inf
    distances = [abs(scores[page] - scores[last]) / max(sizes[page], sizes[last]) for page in differ]
    return max(np.finfo(float).tiny, *distances)  # above 0 though it be a tie


def scores_and_sizes(q, statistics, newest, score, group_reduce):
    """Scores[B, K, P] in float64 of q[B, N, D] and statistics; what their rounding is proportional to.

    That is the sums of their terms' sizes. A share rounds by its own size times that of its logit, of the
    logits that it is a share of, and of one exponential; shares that are no normal float32 are alike.
    """
    q, vectors = (np.asarray(x, np.float64) for x in (q, statistics.values))
    if statistics.scales is not None:
        with np.errstate(invalid="ignore"):  # scales of what is not written are NaN
            vectors = vectors * np.asarray(statistics.scales, np.float64)[..., None]
    q = q.reshape(len(q), vectors.shape[1], -1, q.shape[-1])
    weights = np.stack([np.minimum(q, 0), np.maximum(q, 0)], 3) if score == "bounds" else q[:, :, :, None]
    scores, sizes = (
        np.einsum("bkgzd,bkpzd->bkgp", *arrays)
        for arrays in ((weights, vectors), (np.abs(weights), np.abs(vectors)))
    )
    if group_reduce == "mass":
        before = np.arange(vectors.shape[2]) < newest[:, None, None, None]
        logits, sizes = (np.where(before, x * q.shape[-1] ** -0.5, 0) for x in (scores, sizes))
        shares = np.where(before, np.exp(logits - logits.max(axis=3, keepdims=True, initial=0)), 0)
        shares /= np.maximum(shares.sum(axis=3, keepdims=True), np.finfo(float).tiny)
        sizes = shares * (1 + sizes + (shares * sizes).sum(axis=3, keepdims=True)) + 2**-126 / ROUNDING
        scores = np.where(before, shares, -np.inf)
    reduce = {"mean": np.mean, "max": np.max, "mass": np.mean}[group_reduce]
    return (reduce(x, axis=2) for x in (scores, sizes))


def largest_distance(got, expected, q, statistics, positions, *, page_size, score, group_reduce, sink_pages):
    """The largest `distance` between two results of `select_pages`, (page_ids, counts), for these inputs."""
    (ids, counts), (expected_ids, expected_counts) = (map(np.asarray, chosen) for chosen in (got, expected))
    if not np.array_equal(counts, expected_counts):
        return np.inf
    pages = np.asarray(positions) // page_size
    scores, sizes = scores_and_sizes(q, statistics, pages, score, group_reduce)
    worst = 0.0
    for b, head in itertools.product(*map(range, counts.shape)):
        count, newest = counts[b, head], int(pages[b])
        rows = ids[b, head, :count], expected_ids[b, head, :count]
        forced = {newest, *range(min(sink_pages, newest + 1))}
        worst = max(worst, distance(*rows, scores[b, head], sizes[b, head], forced))
    return worst
