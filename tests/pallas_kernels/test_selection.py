import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import STATISTICS, Statistics
from pallas_kernels.selection.gpu import kernels as mosaic_gpu
from pallas_kernels.selection.tpu import kernels as mosaic_tpu
from tests.pallas_kernels import oracle
from tests.pallas_kernels.page_sets import distance

PAGES, PAGE_SIZE, HEADS, GROUP, DIM = 9, 4, 2, 3, 8


def selected(page_ids, counts):
    """The selected sets as lists of lists of sorted page numbers."""
    return [
        [sorted(np.asarray(ids)[:count].tolist()) for ids, count in zip(row, row_counts, strict=True)]
        for row, row_counts in zip(page_ids, counts, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    score=st.sampled_from(sorted(pallas_kernels.SCORES)),
    group_reduce=st.sampled_from(["mean", "max", "mass"]),
    sink_pages=st.integers(0, 2),
    budget=st.integers(3, 6),
    coarse=st.booleans(),
)
def test_selection_equals_the_oracle(seed, score, group_reduce, sink_pages, budget, coarse):
    rng = np.random.default_rng(seed)
    kind = pallas_kernels.SCORES[score].statistics[0]
    coarse = coarse and group_reduce != "mass"
    positions = rng.integers(0, PAGES * PAGE_SIZE, 3).astype(np.int32)
    shape = (3, HEADS, PAGES, pallas_kernels.STATISTICS[kind].vectors, DIM)
    vectors, q = rng.standard_normal(shape), rng.standard_normal((3, HEADS * GROUP, DIM))
    if coarse:  # small whole numbers: exact arithmetic and many ties
        vectors, q = np.round(vectors), np.round(q)
    if kind == "min_max":
        vectors.sort(axis=3)
    vectors[np.arange(PAGES) > (positions // PAGE_SIZE)[:, None].repeat(HEADS, 1)[..., None]] = np.nan
    budgets = np.array([budget, budget - 1 if budget > sink_pages + 1 else budget, 0], np.int32)
    page_ids, counts = pallas_kernels.select_pages(
        jnp.float32(q),
        Statistics(jnp.float32(vectors), kind=kind),
        jnp.asarray(positions),
        jnp.asarray(budgets),
        page_size=PAGE_SIZE,
        capacity=6,
        score=score,
        group_reduce=group_reduce,
        sink_pages=sink_pages,
    )
    reduce = np.max if group_reduce == "max" else np.mean
    for b, sets in enumerate(selected(page_ids, counts)):
        newest = positions[b] // PAGE_SIZE
        for head, got in enumerate(sets):
            queries = np.float32(q[b, head * GROUP : (head + 1) * GROUP])
            by_query = np.array(
                [
                    [oracle.page_score(query, np.float32(vectors[b, head, p]), score) for query in queries]
                    for p in range(newest + 1)
                ]
            )
            if group_reduce == "mass":  # of the pages before the newest
                by_query = np.exp(by_query / np.sqrt(DIM))
                by_query /= np.maximum(by_query[:newest].sum(axis=0), 1e-30)
            scores = reduce(by_query, axis=1)
            forced = {newest, *range(min(sink_pages, newest + 1))}
            ranked = sorted(range(newest + 1), key=lambda p: (p not in forced, -scores[p], p))
            expected = ranked[: budgets[b]]
            if coarse:
                assert got == sorted(expected)
            else:  # scores of order one, and weights below it
                assert distance(got, expected, scores, np.maximum(np.abs(scores), 1), forced) <= 1e-5


def test_eight_bit_mean_keys_select_as_their_values_do():
    rng = np.random.default_rng(1)
    q = jnp.float32(rng.standard_normal((2, HEADS * GROUP, DIM)))
    eight = STATISTICS["mean_key_int8"].keep(jnp.float32(rng.standard_normal((2, HEADS, PAGES, 1, DIM))))
    fields = {"page_size": PAGE_SIZE, "capacity": 4, "score": "mean_key", "group_reduce": "mass"}
    arguments = jnp.array([33, 17]), jnp.array([4, 3])
    got = pallas_kernels.select_pages(q, eight, *arguments, **fields)
    want = pallas_kernels.select_pages(
        q, Statistics(eight.at_float32(), kind="mean_key"), *arguments, **fields
    )
    assert selected(*got) == selected(*want)


def test_kernels_refuse_what_only_others_select_by():
    q, vectors = jnp.zeros((1, 2, 64)), jnp.zeros((1, 2, 128, 1, 64))
    eight = STATISTICS["mean_key_int8"].keep(vectors)
    fields = {"page_size": 16, "capacity": 4, "score": "mean_key", "sink_pages": 1}
    arguments = jnp.array([33]), jnp.array([4])
    two = jax.tree.map(lambda array: jnp.repeat(array, 2, axis=3), eight)
    q = q.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"vectors_in_8_bits 2 has no Mosaic GPU kernel \(1\)"):
        mosaic_gpu.select_pages(q, two, *arguments, group_reduce="mean", **fields)
    with pytest.raises(NotImplementedError, match=r"vectors_in_8_bits 2 has no Mosaic TPU kernel \(1\)"):
        mosaic_tpu.select_pages(q, two, *arguments, group_reduce="mean", **fields)
    q, one = jnp.zeros((1, 66, 64), jnp.bfloat16), jax.tree.map(lambda array: array[:, :1], eight)
    with pytest.raises(NotImplementedError, match=r"66 heads of a group are more than .* kernel's 32"):
        mosaic_gpu.select_pages(q, one, *arguments, group_reduce="mass", **fields)
    with pytest.raises(NotImplementedError, match="dtype float32 has no Mosaic GPU kernel"):
        mosaic_gpu.select_pages(q.astype(jnp.float32), eight, *arguments, group_reduce="mean", **fields)


def test_the_mean_over_the_group_and_the_maximum_choose_differently():
    q = jnp.array([[[2.0], [-2.5]]])  # page 1 scores 6 and -7.5, page 2 scores -2 and 2.5
    keys = jnp.array([0.0, 3.0, -1.0, 0.5, 0.0]).reshape(1, 1, 5, 1, 1)

    def best(group_reduce):
        ids, counts = pallas_kernels.select_pages(
            q,
            Statistics(keys, kind="mean_key"),
            jnp.array([4]),
            jnp.array([2]),
            page_size=1,
            capacity=2,
            score="mean_key",
            group_reduce=group_reduce,
            sink_pages=0,
        )
        return selected(ids, counts)[0][0]

    assert best("mean") == [2, 4]
    assert best("max") == [1, 4]


def test_bad_arguments_are_refused():
    q, vectors = jnp.ones((1, 2, 4)), Statistics(jnp.ones((1, 2, 3, 2, 4)))
    fields = {"page_size": 4, "capacity": 2}
    arguments = (q, vectors, jnp.array([3]), jnp.array([2]))
    with pytest.raises(ValueError, match="score 'l2' is unknown; use one of bounds, mean_key"):
        pallas_kernels.select_pages(*arguments, **fields, score="l2")
    with pytest.raises(ValueError, match="group_reduce 'sum' is unknown; use one of mean, max, mass"):
        pallas_kernels.select_pages(*arguments, **fields, group_reduce="sum")
    with pytest.raises(ValueError, match=r"capacity 4 is not within 1\.\.3"):
        pallas_kernels.select_pages(*arguments, page_size=4, capacity=4)
