"""Expected attention against its definition in NumPy: rotations as matrices, moments of whole prompts."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax.budget import rules_of
from retro_jax.cache import LayerState
from retro_jax.methods.expected import EXPECTED, FIRST, FUTURE, expected
from retro_jax.models import transformer
from retro_jax.models.config import Rope, RopeScaling
from retro_jax.models.rope import rope_frequencies
from tests.retro_jax.tiny import begin, step, tiny, token_ids

SIZE, PAGES, D, GROUP = 8, 8, 16, 3
PARTLY = Rope(scaling=RopeScaling("yarn", factor=4.0, original_positions=64), channels=8)
MOST = 256
CONFIG = rj.DecodeConfig("expected", page_size=SIZE, budget_tokens=32, dense_layers=1, prefill_chunk=16)


def rotation(rope, position):
    """The matrix [D, D] that turns a vector at a position."""
    matrix = np.eye(D)
    if rope is None:
        return matrix
    frequencies, scale = rope_frequencies(rope, D, MOST)
    half = len(frequencies)
    for channel, frequency in enumerate(frequencies):
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        pair = np.array([channel, channel + half])
        matrix[np.ix_(pair, pair)] = np.array([[cos, -sin], [sin, cos]]) * scale
    return matrix


@functools.cache
def mean_rotation(rope, length):
    """Of the positions after a prompt."""
    return np.mean([rotation(rope, length + ahead) for ahead in range(FUTURE)], axis=0)


def definition(rope, unturned, keys, values, length, reduce=np.mean):
    """By page, for one group: unturned queries [T, G, D] of a prompt, its cached keys and values [T, D]."""
    mean_turn = mean_rotation(rope, length)
    by_head = []
    for queries in np.moveaxis(unturned[FIRST:length], 1, 0):
        mean, covariance = mean_turn @ queries.mean(0), mean_turn @ np.cov(queries.T, bias=True) @ mean_turn.T
        k = keys[FIRST:length]
        logits = k @ mean / np.sqrt(D) + np.einsum("td,de,te->t", k, covariance, k) / (2 * D)
        weights = np.exp(logits - logits.max())
        worth = np.zeros(PAGES)
        tokens = np.arange(FIRST, length)
        np.add.at(
            worth, tokens // SIZE, weights / weights.sum() * np.linalg.norm(values[FIRST:length], axis=1)
        )
        by_head.append(worth)
    return reduce(by_head, axis=0)


@pytest.mark.parametrize(("rope", "reduce"), ((None, "mean"), (PARTLY, "max")), ids=("unturned", "turned"))
def test_pages_are_worth_what_the_definition_says(rope, reduce):
    rng = np.random.default_rng(0)
    lengths, heads = (50, 37), 2
    unturned = rng.normal(1.0, 1.0, (2, 64, heads * GROUP, D))
    turns = np.stack([rotation(rope, position) for position in range(64)])
    q = np.einsum("tde,bthe->bthd", turns, unturned).astype(np.float32)
    pages = rng.normal(size=(2, heads, PAGES, 2, SIZE, D)).astype(np.float32)
    config = replace(CONFIG, group_reduce=reduce)
    rules = replace(rules_of(config, PAGES, D, 4), rope=rope, max_positions=MOST)
    model = replace(tiny(GROUP).config, num_heads=heads * GROUP)
    layer = LayerState(jnp.asarray(pages), kept=EXPECTED.eviction.init(rules, model, 2, PAGES))
    observe = jax.jit(functools.partial(EXPECTED.eviction.observe, rules))
    for start in range(0, 64, 16):  # the second prompt ends within a chunk, and has no part in the last
        positions = np.arange(start, start + 16)
        positions = np.where(positions < np.array(lengths)[:, None], positions, -1)
        chunk = np.where(positions[..., None, None] >= 0, q[:, start : start + 16], np.nan)
        layer = layer.replace(kept=observe(layer, jnp.asarray(chunk), jnp.asarray(positions), None))
    found = np.asarray(jax.jit(functools.partial(expected, rules))(layer, jnp.asarray(lengths)))
    for row, length in enumerate(lengths):
        for head in range(heads):
            keys, values = np.moveaxis(pages[row, head], 1, 0).reshape(2, -1, D).astype(np.float64)
            group = slice(head * GROUP, (head + 1) * GROUP)
            wanted = definition(
                rope, unturned[row, :, group], keys, values, length, np.mean if reduce == "mean" else np.max
            )
            np.testing.assert_allclose(found[row, head], wanted, rtol=2e-4, atol=1e-7)
            assert np.ptp(wanted[1:4]) > 1e-3


def test_a_prompt_is_compressed_by_it_at_its_end_and_then_grows():
    model, tokens, lengths = tiny(GROUP, layers=2), jnp.asarray(token_ids(2, 60)), (3, 45)
    state, _ = begin(model, CONFIG, np.asarray(tokens), lengths, 60)
    newest = jnp.asarray([tokens[row, length] for row, length in enumerate(lengths)])
    for _ in range(10):
        state, _ = step(model.params, model.config, CONFIG, state, newest)
    alive = np.asarray(state.layers[1].kept.alive)
    assert alive[0].all()  # three tokens leave no weights, and fit the budget

    positions = jnp.broadcast_to(jnp.arange(60), tokens.shape)
    x = transformer.embed(model.params, model.config, tokens)
    below, own = model.params.layers
    kind = model.config.layers[0]
    q, k, v = transformer.qkv(below, model.config, kind, x, positions)
    x = transformer.attention_output(below, model.config, x, transformer.causal_attention(q, k, v))
    x = transformer.mlp(below, model.config, x)
    _, k, v = transformer.qkv(own, model.config, kind, x, positions)
    unturned, *_ = transformer.qkv(own, model.config, replace(kind, rope=None), x, positions)
    unturned, k, v = (np.asarray(array, np.float64)[1] for array in (unturned, k, v))
    for head in range(2):
        group = slice(head * GROUP, (head + 1) * GROUP)
        worth = definition(kind.rope, unturned[:, group], k[:, head], v[:, head], 45)
        # 32 tokens are 4 pages: the sink, that of position 45, and the best two of those between.
        ranked = sorted(range(1, 5), key=lambda page: -worth[page])
        assert worth[ranked[1]] - worth[ranked[2]] > 1e-4  # rounding decides nothing
        assert set(np.flatnonzero(alive[1, head])) == {0, 5, 6, 7, *ranked[:2]}


def test_a_later_prompt_is_judged_by_its_own_queries():
    model, tokens = tiny(GROUP, layers=2), token_ids(1, 60)
    state, _ = begin(model, CONFIG, np.repeat(tokens, 2, axis=0), (20, 45), 60)
    state, _ = step(model.params, model.config, CONFIG, state, jnp.zeros(2, jnp.int32))
    more = jax.jit(rj.extend, static_argnames=("model", "config"))
    state = more(
        model.params, model.config, CONFIG, state, jnp.asarray(tokens[:, :9].repeat(2, 0)), jnp.array([9, 0])
    )[0]
    moments = state.layers[1].kept.prompt.moments
    assert moments.count.tolist() == [9, 45 - FIRST]
    assert state.layers[1].kept.prompt.fresh.tolist() == [True, False]
