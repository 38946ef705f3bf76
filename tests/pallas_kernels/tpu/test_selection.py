"""The TPU kernel of page selection in the interpreter, against the reference."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Statistics
from pallas_kernels.selection.tpu import kernels as mosaic_tpu
from tests.pallas_kernels.equality import SCORED, assert_same_selection
from tests.pallas_kernels.inputs import random_statistics, shapes_of_statistics
from tests.pallas_kernels.page_sets import ROUNDING
from tests.pallas_kernels.tpu.interpreter import INTERPRET, run

pytestmark = pytest.mark.timeout(120)
S = 16
SCORES = SCORED["mosaic_tpu"]
SIZES = itertools.cycle(  # reduction, group, sink pages, KV heads, pages, head_dim, dtype
    [
        ("mean", 3, 1, 2, 152, 64, jnp.bfloat16),
        ("mean", 1, 2, 9, 130, 64, jnp.bfloat16),
        ("max", 9, 0, 3, 300, 128, jnp.bfloat16),
        ("max", 4, 1, 2, 256, 128, jnp.float32),
        ("max", 1, 2, 1, 40, 256, jnp.float32),
        ("mass", 4, 1, 2, 136, 64, jnp.bfloat16),
        ("mass", 3, 1, 3, 70, 128, jnp.float32),
    ]
)


def assert_selects_what_the_reference_does(
    q, statistics, lengths, budgets, *, rounding=ROUNDING, **arguments
):
    """The same pages, in ascending order, but for pages within `rounding` of the last one chosen."""
    arguments = {"page_size": S, "capacity": max(*budgets, 1), **arguments}
    inputs = q, statistics, jnp.asarray(lengths, jnp.int32) - 1, jnp.asarray(budgets, jnp.int32)
    ids, counts = run(mosaic_tpu.select_pages, *inputs, **arguments)
    for name in ("block", "interpret"):
        arguments.pop(name, None)
    for row, count in zip(
        np.asarray(ids).reshape(-1, ids.shape[-1]), np.asarray(counts).ravel(), strict=True
    ):
        assert (np.diff(row[:count]) > 0).all()
    assert_same_selection((ids, counts), inputs, rounding=rounding, **arguments)


@pytest.mark.parametrize(
    ("score", "kind", "group_reduce", "group", "sink_pages", "heads", "pages", "dim", "dtype"),
    [(*scored, *next(SIZES)) for scored in (*SCORES, *SCORES, SCORES[0])],
)
def test_selection_equals_the_reference(
    score, kind, group_reduce, group, sink_pages, heads, pages, dim, dtype
):
    rng = np.random.default_rng(group)
    lengths = [pages * S - 5, pages * S // 2 + 1, 3, pages * S]
    budgets = [pages // 3, pages, 1, 0]
    q = jnp.asarray(rng.standard_normal((4, heads * group, dim)), dtype)
    statistics = random_statistics(rng, lengths, S, heads, pages, kind, dim, dtype)
    assert_selects_what_the_reference_does(
        q,
        statistics,
        lengths,
        budgets,
        score=score,
        group_reduce=group_reduce,
        sink_pages=sink_pages,
    )


def test_more_pages_than_one_chunk_or_block_and_more_places_than_a_tile():
    rng = np.random.default_rng(0)
    lengths = [1299 * S + 2, 700 * S]
    statistics = random_statistics(rng, lengths, S, 1, 1300, "min_max", 64, jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((2, 2, 64)), jnp.bfloat16)
    arguments = {"score": "bounds", "group_reduce": "mean", "sink_pages": 1, "block": 256}
    assert_selects_what_the_reference_does(q, statistics, lengths, [333, 45], **arguments)


def test_two_cores_share_the_sequences():
    rng = np.random.default_rng(0)
    lengths = [200 * S, 2, 77 * S + 1, 150 * S]
    assert_selects_what_the_reference_does(
        jnp.asarray(rng.standard_normal((4, 4, 64)), jnp.bfloat16),
        random_statistics(rng, lengths, S, 2, 200, "mean_key", 64, jnp.bfloat16),
        lengths,
        [40, 1, 30, 150],
        score="mean_key",
        group_reduce="max",
        sink_pages=1,
        interpret=dataclasses.replace(INTERPRET, num_cores_or_threads=2),
    )


def test_ties_go_to_the_lower_page():
    """All pages score alike, or there are eight scores, of both signs and zero; none of them rounds."""
    scores = np.array([0.0, -1.0, 2.0, -3.0, 1.0, -0.5, -2.0, 0.25] * 20)
    scores = np.stack([np.full(160, 0.5), scores, scores])[:, None, :, None, None]
    assert_selects_what_the_reference_does(
        jnp.ones((3, 1, 64), jnp.bfloat16),
        Statistics(jnp.asarray(np.tile(scores, (1, 1, 1, 1, 64)), jnp.bfloat16), kind="mean_key"),
        [150 * S, 160 * S, 160 * S],
        [37, 30, 110],
        score="mean_key",
        group_reduce="mean",
        sink_pages=0,
        rounding=0,
    )


def test_selection_refuses_what_it_does_not_support():
    def select(dim=64, pages=40, page_size=16, dtype=jnp.bfloat16):
        return mosaic_tpu.select_pages(
            jnp.zeros((1, 2, dim), dtype),
            shapes_of_statistics("min_max", (1, 2, pages), dim, dtype),
            jnp.zeros(1, jnp.int32),
            jnp.ones(1, jnp.int32),
            page_size=page_size,
            capacity=4,
            score="bounds",
            group_reduce="mean",
            sink_pages=1,
        )

    for message, arguments in [
        ("dtype float16 has no Mosaic TPU kernel", {"dtype": jnp.float16}),
        (r"head_dim 96 has no Mosaic TPU kernel \(64, 128, 256\)", {"dim": 96}),
        ("page_size 8 has no Mosaic TPU kernel", {"page_size": 8}),
        (r"needs \d+ bytes of VMEM, and a v5e has \d+", {"pages": 2**20}),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(functools.partial(select, **arguments))
