import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.dispatch import kernels_of_device
from pallas_kernels.operation import Accepted, only_asked
from pallas_kernels.sliding import reference
from retro_jax.experiments.bench.chips import CHIPS, on_chip

HEADS, GROUP, DIM, SIZE, TOKENS, CHUNK = 2, 3, 8, 4, 52, 16
SINKS = np.linspace(-2, 2, HEADS * GROUP).astype(np.float32)
ATOL = 2e-6  # float32, values of order one


def text(batch: int = 2):
    """q, k, v of some tokens."""
    rng = np.random.default_rng(batch)
    heads = HEADS * GROUP, HEADS, HEADS
    return [rng.standard_normal((batch, TOKENS, n, DIM)).astype(np.float32) for n in heads]


def empty(ring: int, dtype: str, batch: int = 2):
    """A ring that holds nothing: NaN, which no query may read."""
    pages = pallas_kernels.empty_pages((batch, HEADS, -(-ring // SIZE), 2, SIZE, DIM), dtype)
    nothing = lambda array: jnp.full_like(array, jnp.nan)  # noqa: E731
    return nothing(pages) if dtype == "float32" else pages.replace(scales=nothing(pages.scales))


def attention_to_windows(q, k, v, window):
    """Outputs [B, T, N, D] of every token over its window, a sink's weight taken from each head."""
    k, v = (np.repeat(part, GROUP, axis=2).astype(np.float64) for part in (k, v))
    token, key = np.ogrid[:TOKENS, :TOKENS]
    seen = (key <= token) & (key > token - window)
    weights = np.exp(np.einsum("btnd,bsnd->bnts", q, k) * DIM**-0.5) * seen
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(SINKS)[:, None, None]
    return np.einsum("bnts,bsnd->btnd", weights, v)


@functools.partial(jax.jit, static_argnames=("window", "ring"))
def chunk(pages, q, k, v, start, positions, window, ring):
    o = pallas_kernels.chunk_attention(
        q, k, v, pages, start, positions, jnp.asarray(SINKS), window=window, ring=ring
    )
    return o, pallas_kernels.update_ring(pages, k, v, start, positions >= 0, ring=ring)


@functools.partial(jax.jit, static_argnames=("window", "ring"))
def step(pages, q, k, v, start, positions, window, ring):
    pages = pallas_kernels.update_ring(pages, k, v, start, positions >= 0, ring=ring)
    o = pallas_kernels.window_attention(q, pages, positions, jnp.asarray(SINKS), window=window, ring=ring)
    return o, pages


@pytest.mark.parametrize(
    ("window", "slots", "dtype"),
    [
        (8, 1, "float32"),  # whole pages, shorter than a chunk
        (3, 2, "float32"),  # less than a page
        (7, 3, "int8"),  # more than a page
    ],
)
def test_a_text_in_chunks_and_steps_attends_to_its_windows(window, slots, dtype):
    parts, ring = text(), window + slots - 1
    pages, start = empty(ring, dtype), np.zeros(2, np.int32)
    held = [np.asarray(pallas_kernels.pages.as_kept(jnp.asarray(part), pages)) for part in parts[1:]]
    expected = attention_to_windows(parts[0], *held, window)

    def run(call, first, positions, changed=0.0):
        """What the call gives for these positions, NaN where there is none; checks its outputs."""
        valid, at = positions >= 0, np.maximum(positions, 0)
        rows = [np.take_along_axis(part, at[..., None, None], axis=1) + changed for part in parts]
        rows = [np.where(valid[..., None, None], part, np.nan).astype(np.float32) for part in rows]
        o, new = call(pages, *rows, first, positions, window=window, ring=ring)
        if not changed:
            for b, t in zip(*np.nonzero(valid), strict=True):
                np.testing.assert_allclose(o[b, t], expected[b, at[b, t]], atol=ATOL)
        return new

    for counts in ((0, 2), (16, 16), (3, 1), (11, 16)):
        offset = np.arange(CHUNK, dtype=np.int32)
        positions = np.where(offset < np.array(counts)[:, None], start[:, None] + offset, -1)
        pages = run(chunk, start, positions)
        start = start + np.array(counts, np.int32)
    # What the older slots have written is stale, until it is written anew with the newest.
    older = np.arange(slots, dtype=np.int32) - slots
    if slots > 1:
        pages = run(step, start - slots, np.where(older >= -slots + 1, start[:, None] + older, -1), 9.0)
    for _ in range(TOKENS - start.max()):
        pages = run(step, start - slots + 1, start[:, None] + older + 1)
        start = start + 1


def test_one_query_in_a_ring_of_its_window_is_dense_attention():
    """So kernels of dense attention serve it; the definition, with masks by position, gives the same."""
    q, k, v = map(jnp.asarray, text(3))
    lengths, window = jnp.array([2, 11, 40]), 11
    pages = empty(window, "float32", 3)
    valid = jnp.arange(TOKENS) < lengths[:, None]
    pages = pallas_kernels.update_ring(pages, k, v, jnp.zeros(3, jnp.int32), valid, ring=window)
    newest = jnp.take_along_axis(q, (lengths - 1)[:, None, None, None], axis=1)
    arguments = newest, pages, (lengths - 1)[:, None], jnp.asarray(SINKS)
    sizes = {"window": window, "ring": window}
    np.testing.assert_allclose(
        pallas_kernels.window_attention(*arguments, **sizes),
        reference.window_attention(*arguments, **sizes),
        atol=2e-6,
    )


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_take_one_query_and_on_hopper_more(chip):
    def ask(slots, ring):
        shape = jax.ShapeDtypeStruct
        arrays = (
            shape((1, slots, 8, 128), jnp.bfloat16),
            shape((1, 2, 16, 2, 16, 128), jnp.bfloat16),
            shape((1, slots), jnp.int32),
        )
        with on_chip(chip), only_asked():
            sizes = {"window": 128, "ring": ring, "implementation": kernels_of_device()}
            jax.eval_shape(functools.partial(pallas_kernels.window_attention, **sizes), *arrays)

    with pytest.raises(Accepted):
        ask(1, 128)
    for slots, ring in ((1, 130), (3, 130)):
        hopper = chip == "H100, H200"
        refused = "in a ring of more places than its window has no 'mosaic_tpu'"
        with pytest.raises(Accepted) if hopper else pytest.raises(NotImplementedError, match=refused):
            ask(slots, ring)
    with pytest.raises(
        ValueError, match=r"ring of 129 tokens is too small for 3 queries .* 128; it takes 130"
    ):
        ask(3, 129)


@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_what_was_overwritten_is_put_back(dtype):
    _, k, v = map(jnp.asarray, text())
    ring, start = 7, jnp.array([9, 30])
    pages = empty(ring, dtype)
    pages = pallas_kernels.update_ring(pages, k, v, start - TOKENS, jnp.ones((2, TOKENS), bool), ring=ring)
    saved = pallas_kernels.read_ring(pages, start, 5, ring=ring)
    changed = pallas_kernels.update_ring(
        pages, k[:, :5] + 1, v[:, :5] + 1, start, jnp.ones((2, 5), bool), ring=ring
    )
    rejected = jnp.arange(5) >= jnp.array([[2], [5]])
    back = pallas_kernels.restore_ring(changed, saved, start, rejected, ring=ring)
    for b, kept_tokens in enumerate((2, 5)):
        for index in range(5):
            place = (int(start[b]) + index) % ring
            want = changed if index < kept_tokens else pages
            for got, whole in zip(jax.tree.leaves(back), jax.tree.leaves(want), strict=True):
                at = b, slice(None), place // SIZE, slice(None), place % SIZE
                np.testing.assert_array_equal(got[at], whole[at])
    every = pallas_kernels.restore_ring(changed, saved, start, jnp.ones((2, 5), bool), ring=ring)
    jax.tree.map(np.testing.assert_array_equal, every, pages)
