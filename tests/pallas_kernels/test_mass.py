import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.pallas_kernels import oracle

HEADS, GROUP, DIM, PAGES, SIZE = 2, 3, 8, 11, 4
REDUCE = {"mean": np.mean, "max": np.max}


def expected_mass(q, pages, position, ids, group_reduce):
    """The mass [P] that a group's queries q[G, D] give to the pages `ids` of its head's pages[P, 2, S, D]."""
    mass = np.zeros((GROUP, PAGES))
    for head, query in enumerate(q):
        seen = [p for p in ids if p * SIZE <= position]
        if not seen:
            continue
        k = [pages[p, 0, : position + 1 - p * SIZE] for p in seen]
        _, lse = oracle.attend(query, np.concatenate(k), np.concatenate(k))
        for page, keys in zip(seen, k, strict=True):
            mass[head, page] = np.exp(keys.astype(np.float64) @ query / np.sqrt(DIM) - lse).sum()
    return REDUCE[group_reduce](mass, axis=0)


@pytest.fixture
def inputs():
    """Three sequences of other lengths, NaN beyond each; the last has no query."""
    rng = np.random.default_rng(0)
    positions = np.array([[5, 6, -1], [38, 39, 40], [-1, -1, -1]], np.int32)
    pages = rng.standard_normal((3, HEADS, PAGES, 2, SIZE, DIM)).astype(np.float32)
    place = np.arange(PAGES * SIZE).reshape(PAGES, SIZE)
    beyond = place > positions.max(axis=1)[:, None, None]
    pages[np.broadcast_to(beyond[:, None, :, None], pages.shape[:-1])] = np.nan
    q = 2 * rng.standard_normal((3, 3, HEADS * GROUP, DIM)).astype(np.float32)
    return rng, q, pages, positions


@pytest.mark.parametrize("group_reduce", REDUCE)
@pytest.mark.parametrize("block_tokens", (12, 1024))  # 3 pages: 11 are no whole number of blocks
def test_attention_mass(inputs, group_reduce, block_tokens, monkeypatch):
    rng, q, pages, positions = inputs
    monkeypatch.setattr("pallas_kernels.attention.mass._BLOCK_TOKENS", block_tokens)
    allowed = rng.random((3, HEADS, PAGES)) < 0.7
    mass = pallas_kernels.attention_mass(
        jnp.asarray(q),
        jnp.asarray(pages),
        jnp.asarray(positions),
        jnp.asarray(allowed),
        group_reduce=group_reduce,
    )
    for b in range(3):
        for head in range(HEADS):
            ids, group = np.flatnonzero(allowed[b, head]), slice(head * GROUP, (head + 1) * GROUP)
            expected = sum(
                expected_mass(q[b, t, group], pages[b, head], positions[b, t], ids, group_reduce)
                for t in range(3)
            )
            np.testing.assert_allclose(mass[b, head], expected, atol=2e-6)
    if group_reduce == "mean":
        np.testing.assert_allclose(mass.sum(-1)[1], 3, rtol=1e-6)  # each query's weights add up to 1


@pytest.mark.parametrize("group_reduce", REDUCE)
def test_selected_mass_reads_the_selected_pages_only(inputs, group_reduce):
    rng, q, pages, positions = inputs
    counts = np.array([[1, 2], [4, 3], [0, 0]], np.int32)
    ids = np.stack([[rng.permutation(2 if b == 0 else PAGES - 1) for _ in range(HEADS)] for b in (1, 1, 1)])[
        ..., :6
    ]
    ids[0, :, :2] = [[1, 0], [0, 1]]
    newest = positions.max(axis=1)
    for b in range(3):
        for head in range(HEADS):
            others = np.setdiff1d(np.arange(PAGES), ids[b, head, : counts[b, head]])
            pages[b, head, others] = np.nan
    mass = pallas_kernels.selected_mass(
        jnp.asarray(q[:, -1]),
        jnp.asarray(pages),
        jnp.asarray(ids.astype(np.int32)),
        jnp.asarray(counts),
        jnp.asarray(newest),
        group_reduce=group_reduce,
    )
    for b in range(3):
        for head in range(HEADS):
            group = slice(head * GROUP, (head + 1) * GROUP)
            chosen = ids[b, head, : counts[b, head]]
            expected = expected_mass(q[b, -1, group], pages[b, head], newest[b], chosen, group_reduce)
            np.testing.assert_allclose(mass[b, head], expected, atol=2e-6)


def test_what_sinks_take_no_page_gets(inputs):
    """The mass of every page of a head shrinks by what its sink takes of each query's weight."""
    _, q, pages, positions = inputs
    q, pages, positions = q[1:2, :1], pages[1:2], positions[1:2, :1]
    sinks = np.repeat(np.array([2.0, -1.0], np.float32), GROUP)
    allowed = np.ones((1, HEADS, PAGES), bool)
    lse = np.array(
        [
            oracle.attend(q[0, 0, n], *oracle.tokens_of(pages[0], n // GROUP, range(PAGES), positions[0, 0]))[
                1
            ]
            for n in range(HEADS * GROUP)
        ]
    )
    left = (1 / (1 + np.exp(sinks - lse))).reshape(HEADS, GROUP).mean(axis=1)
    every = np.broadcast_to(np.arange(PAGES, dtype=np.int32), (1, HEADS, PAGES))
    counts = np.full((1, HEADS), PAGES, np.int32)
    for mass in (
        pallas_kernels.attention_mass(
            *map(jnp.asarray, (q, pages, positions, allowed, sinks)), group_reduce="mean"
        ),
        pallas_kernels.selected_mass(
            *map(jnp.asarray, (q[:, 0], pages, every, counts, positions[:, 0], sinks)), group_reduce="mean"
        ),
    ):
        np.testing.assert_allclose(mass.sum(-1)[0], left, rtol=1e-5)


def test_attention_over_allowed_pages_is_attention_over_their_tokens(inputs):
    rng, q, pages, positions = inputs
    allowed = rng.random((3, HEADS, PAGES)) < 0.7
    pages[~allowed] = np.nan
    o = pallas_kernels.attend_pages(*map(jnp.asarray, (q, pages, positions, allowed)))
    for b, t, n in np.ndindex(3, 3, HEADS * GROUP):
        head = n // GROUP
        tokens = oracle.tokens_of(pages[b], head, np.flatnonzero(allowed[b, head]), positions[b, t])
        np.testing.assert_allclose(o[b, t, n], oracle.attend(q[b, t, n], *tokens)[0], atol=2e-6)
