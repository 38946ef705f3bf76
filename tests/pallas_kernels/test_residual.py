"""Estimates of pages that no load has brought, against NumPy in float64, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Statistics
from tests.pallas_kernels import oracle

HEADS, GROUP, SIZE, PAGES, DIM, WINDOW, TOKENS = 2, 3, 4, 16, 8, 4, 47
POSITIONS = np.arange(TOKENS - WINDOW, TOKENS)


def inputs(block_pages):
    """Queries of the window, pages whose unused places are NaN, mean keys, block values."""
    rng = np.random.default_rng(block_pages)
    q = rng.standard_normal((1, WINDOW, HEADS * GROUP, DIM)) * 3
    pages = rng.standard_normal((1, HEADS, PAGES, 2, SIZE, DIM))
    beyond = np.arange(PAGES * SIZE).reshape(PAGES, SIZE) >= TOKENS
    pages[np.broadcast_to(beyond[None, None, :, None, :, None], pages.shape)] = np.nan
    mean_keys = pages[:, :, :, 0].mean(axis=3, keepdims=True)
    blocks = jnp.full((1, HEADS, -(-PAGES // block_pages), DIM), jnp.nan)
    settled = jnp.array([POSITIONS[0]])
    values = pallas_kernels.settle_blocks(
        blocks, jnp.float32(pages), jnp.array([-5]), settled, block_pages=block_pages, count=40
    )
    return rng, q, pages, mean_keys, values


def exact_and_estimated(q, pages, head, union, position, block_pages):
    """Attention to the tokens of `union` and, for each other page of settled blocks, S times its mean key."""
    k, v = oracle.tokens_of(pages, head, sorted(union), position)
    settled = POSITIONS[0] // (block_pages * SIZE) * block_pages
    for page in set(range(settled)) - union:
        block = page // block_pages * block_pages
        values = pages[head, block : block + block_pages, 1].reshape(-1, DIM).mean(axis=0)
        k = np.concatenate([k, np.repeat(pages[head, page, 0].mean(axis=0)[None], SIZE, axis=0)])
        v = np.concatenate([v, np.repeat(values[None], SIZE, axis=0)])
    return oracle.attend(q, k, v)[0]


@pytest.mark.parametrize("block_pages", (1, 3, 20))
def test_settled_blocks_have_the_mean_of_their_values(block_pages):
    _, _, pages, _, values = inputs(block_pages)
    size = block_pages * SIZE
    for block in range(PAGES // block_pages):
        settled = (block + 1) * size <= POSITIONS[0]
        expected = pages[0, :, block * block_pages : (block + 1) * block_pages, 1].mean(axis=(1, 2))
        expected = expected if settled else np.full_like(expected, np.nan)
        np.testing.assert_allclose(values[0, :, block], expected, atol=1e-6)


@pytest.mark.parametrize("block_pages", (1, 3, 20))
def test_after_any_page_sets_the_output_is_the_union_and_estimates_of_the_rest(block_pages):
    rng, q, pages, mean_keys, values = inputs(block_pages)
    queries, cache = jnp.float32(q), jnp.float32(pages)
    last_loaded = jnp.full((1, HEADS, PAGES), -1)
    unions = {}  # of each position and KV head
    for step in range(WINDOW):
        # The window fills up: only slots that exist by this step, each at its own position.
        positions = np.where(np.arange(WINDOW) >= WINDOW - 1 - step, POSITIONS - (WINDOW - 1 - step), -1)
        own = jnp.roll(queries, WINDOW - 1 - step, axis=1)
        newest = POSITIONS[step] // SIZE
        page_ids = np.stack([rng.permutation(newest + 1)[:4] for _ in range(HEADS)])[None]
        for head in range(HEADS):
            for position in positions[positions >= 0]:
                unions.setdefault((position, head), set()).update(page_ids[0, head].tolist())
        if step == 0:
            cached_o = jnp.zeros((1, WINDOW - 1, HEADS * GROUP, DIM))
            cached_lse = jnp.full((1, WINDOW - 1, HEADS * GROUP), -jnp.inf)
        o, lse, last_loaded = pallas_kernels.retro_attention(
            own,
            cache,
            jnp.asarray(page_ids, jnp.int32),
            jnp.full((1, HEADS), 4),
            last_loaded,
            jnp.asarray(positions)[None],
            cached_o,
            cached_lse,
        )
        cached_o, cached_lse = o[:, 1:], lse[:, 1:]
        estimates = pallas_kernels.attend_estimates(
            own,
            Statistics(jnp.float32(mean_keys), kind="mean_key"),
            values,
            last_loaded,
            jnp.asarray(positions)[None],
            jnp.array([POSITIONS[0]]),
            page_size=SIZE,
            block_pages=block_pages,
        )
        output, _ = pallas_kernels.merge(o, lse, *estimates)
        for slot in np.flatnonzero(positions >= 0):
            position = positions[slot]
            for n in range(HEADS * GROUP):
                head = n // GROUP
                expected = exact_and_estimated(
                    np.asarray(own)[0, slot, n],
                    pages[0],
                    head,
                    unions[position, head],
                    position,
                    block_pages,
                )
                np.testing.assert_allclose(output[0, slot, n], expected, atol=1e-5)
    assert len(unions[POSITIONS[0], 0]) > 4 and (block_pages == 20 or np.isfinite(estimates[1]).any())


def test_nothing_is_estimated_where_everything_was_loaded():
    _, q, _, mean_keys, values = inputs(1)
    o, lse = pallas_kernels.attend_estimates(
        jnp.float32(q),
        Statistics(jnp.float32(mean_keys), kind="mean_key"),
        values,
        jnp.full((1, HEADS, PAGES), TOKENS - 1),
        jnp.asarray(POSITIONS)[None],
        jnp.array([POSITIONS[0]]),
        page_size=SIZE,
        block_pages=1,
    )
    assert not o.any() and np.isneginf(lse).all()
