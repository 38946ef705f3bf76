"""Every registered method, and what Quest and RetroAttention combine with, runs through one matrix.

The tests of the matrix share shapes and configurations, so that each step is compiled few times.
"""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.budget import Budget, budget_pages, most_pages
from retro_jax.methods import METHODS
from tests.retro_jax.tiny import ATOL, assert_decided, begin, force, forced_logits, step, tiny, token_ids

LENGTHS, STEPS = (3, 21), 12
BUDGET_PAGES, CACHE_PAGES = 3, 4
FIELDS = {"page_size": 8, "budget_tokens": 24, "dense_layers": 1, "observation": 8, "prefill_chunk": 16}

VARIANTS = {
    **{method: {"method": method} for method in sorted(METHODS)},
    "quest-oracle": {"method": "quest", "score": "oracle"},
    "quest-random": {"method": "quest", "score": "random"},
    "retro-evict-h2o": {"method": "retro", "evict": "h2o", "cache_tokens": 32},
    "retro-taken-over": {"method": "retro", "anchor_every": 2, "select_every": 4},
}


@pytest.fixture(scope="module", params=VARIANTS)  # one after the other: their steps are compiled once
def config(request):
    return rj.DecodeConfig(**FIELDS | VARIANTS[request.param])


def model_for(config):
    """With one sparse layer; with two for windows, whose corrections show in the second."""
    return tiny(3, layers=3 if config.attention.revises else 2)


def observed(model, config, tokens, lengths, steps=STEPS):
    """Per step: the newest positions [B], and the pages that each sparse layer loaded, bool [B, K, P]."""
    seen = []

    def observe(state):
        newest = np.asarray(state.length) - 1
        loaded = [
            np.asarray(layer.last_loaded) == newest[:, None, None] for layer in state.layers if layer.outputs
        ]
        seen.append((newest, loaded))

    force(model, config, begin(model, config, tokens, lengths, 60)[0], tokens, steps, observe)
    return seen


def test_a_budget_of_the_whole_context_is_full_attention(config):
    model, tokens = model_for(config), token_ids(2, 60)
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    lengths = (3, 12)  # 24 tokens in the end, as the budget
    logits = forced_logits(model, config, tokens, lengths, STEPS)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[:, row], expected[row, length : length + STEPS], atol=ATOL)
    if not config.attention.dense:
        assert (
            np.abs(forced_logits(model, config, tokens, (3, 44), STEPS)[-1, 1] - expected[1, 55]).max() > 1e-3
        )


def test_forced_pages_are_loaded_within_the_budget_and_the_rest_are_real_pages(config):
    if config.attention.dense:
        pytest.skip("a dense method selects nothing")
    model, tokens = model_for(config), token_ids(2, 60)
    for newest, layers in observed(model, config, tokens, (21, 44)):
        for chosen in layers:
            assert chosen[:, :, 0].all()  # the sink
            for row, position in enumerate(newest):
                assert chosen[row, :, position // 8].all()
                assert not chosen[row, :, position // 8 + 1 :].any()
            budget = np.full(2, BUDGET_PAGES)
            if config.eviction and config.eviction.grows:  # by the pages after that of the first step
                budget += newest // 8 - np.array((21, 44)) // 8
            assert (chosen.sum(-1) == np.minimum(budget, newest // 8 + 1)[:, None]).all()


def test_an_evicted_page_never_comes_back_and_the_cache_keeps_its_limit(config):
    if not config.eviction:
        pytest.skip("nothing is evicted")
    model, tokens = model_for(config), token_ids(2, 60)
    state, _ = begin(model, config, tokens, (5, 37), 60)
    gone, evicted = [np.zeros(layer.pages.shape[:3], bool) for layer in state.layers[1:]], 0

    def observe(state):
        nonlocal evicted
        newest = np.asarray(state.length) - 1
        begun = np.arange(8) <= (newest // 8)[:, None, None]
        for past, layer in zip(gone, state.layers[1:], strict=True):
            alive = np.asarray(layer.kept.alive)
            assert alive[~np.broadcast_to(begun, alive.shape)].all()
            assert not (past & alive).any()
            assert not (np.asarray(layer.last_loaded) == newest[:, None, None])[~alive].any()
            past |= ~alive
            evicted += past.sum()
            if not config.eviction.grows:
                limit = CACHE_PAGES if config.evict else BUDGET_PAGES
                assert ((alive & begun).sum(-1) == np.minimum(newest // 8 + 1, limit)[:, None]).all()

    force(model, config, state, tokens, 20, observe)
    assert evicted > 0


def test_a_sequence_depends_neither_on_its_batch_nor_on_the_capacity(config):
    model, tokens = model_for(config), token_ids(2, 60)
    together = forced_logits(model, config, tokens, LENGTHS, STEPS)
    for row, length in enumerate(LENGTHS):
        alone = forced_logits(model, config, tokens[row : row + 1], [length], STEPS, capacity=200)
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=ATOL)


def test_what_lies_beyond_a_sequence_is_never_read(config):
    model, tokens = model_for(config), token_ids(2, 60)
    clean, _ = begin(model, config, tokens, LENGTHS, 60)
    beyond = np.arange(clean.capacity).reshape(-1, 8) >= np.asarray(clean.length)[:, None, None]  # [B, P, S]

    def poison(layer):
        return layer.replace(pages=jnp.where(beyond[:, None, :, None, :, None], jnp.nan, layer.pages))

    poisoned = jax.tree.map(jnp.copy, clean.replace(layers=tuple(map(poison, clean.layers))))
    np.testing.assert_array_equal(
        force(model, config, poisoned, tokens, STEPS)[1], force(model, config, clean, tokens, STEPS)[1]
    )


def test_a_scan_is_its_steps_a_saved_state_goes_on_and_an_ended_sequence_stays_as_it_is(config):
    model, tokens = model_for(config), token_ids(2, 60)
    scan = jax.jit(rj.decode, static_argnames=("model", "config", "steps"))

    def run(state, first, remaining=(100, 100)):
        remaining = jnp.array(remaining)
        return scan(model.params, model.config, config, state, first, steps=6, remaining=remaining)

    state, logits = begin(model, config, tokens, (9, 30), 60)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    half_state, half = run(state, first)
    restored = flax.serialization.from_bytes(half_state, flax.serialization.to_bytes(half_state))
    end_state, rest = run(restored, half.pending)

    newest, chosen = first, []
    for _ in range(12):
        state, out = step(model.params, model.config, config, state, newest)
        assert_decided(out)
        newest = jnp.argmax(out, axis=-1).astype(jnp.int32)
        chosen.append(newest)
    np.testing.assert_array_equal(np.concatenate([half.tokens, rest.tokens], axis=1), np.stack(chosen, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL),
        jax.tree.leaves(end_state),
        jax.tree.leaves(state),
    )

    after, _ = run(half_state, half.pending, (100, 0))
    assert list(after.length) == [21, 36]
    states = [jax.tree.leaves(state.replace(metrics=None)) for state in (after, half_state, end_state)]
    for new, old, other in zip(*states, strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        np.testing.assert_allclose(new[0], other[0], atol=ATOL)
    assert after.metrics.kv_bytes[0] > 0 and after.metrics.kv_bytes[1] == 0


@pytest.mark.parametrize("name", ("snapkv", "retro-evict-h2o", "retro-taken-over"))
def test_sharded_is_unsharded(name):
    config = rj.DecodeConfig(**FIELDS | VARIANTS[name])
    model, tokens = model_for(config), token_ids(2, 60)
    expected = forced_logits(model, config, tokens, (9, 30), STEPS)
    mesh = rj.make_mesh(2, 2)
    sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    state = rj.shard_state(begin(model, config, tokens, (9, 30), 60)[0], model.config, mesh)
    state, logits = force(sharded, config, state, tokens, STEPS)
    np.testing.assert_allclose(logits, expected, atol=ATOL)
    if config.eviction:
        alive = state.layers[-1].kept.alive
        assert alive.sharding.shard_shape(alive.shape)[:2] == (1, 1)


def test_kv_bytes_are_those_of_the_vectors_that_a_method_reads(config):
    model, tokens = model_for(config), token_ids(2, 60)
    state, _ = force(model, config, begin(model, config, tokens, (21, 44), 60)[0], tokens, 1)
    layers = model.config.num_layers
    dense = layers if config.attention.dense else 1
    context, begun = np.array([22, 45]), np.array([3, 6])
    loaded = np.minimum(begun, BUDGET_PAGES) * 2 * 8
    scored = np.minimum(begun, CACHE_PAGES) if config.evict else begun
    vectors = {"bounds": 2, "mean_key": 1, "oracle": 8, "random": 0}[config.score]
    if config.method not in ("quest", "retro"):
        vectors = 0
    anchors = len(range(dense, layers, config.anchor_every))
    read = dense * 2 * context + (layers - dense) * loaded + anchors * vectors * scored
    np.testing.assert_allclose(state.metrics.kv_bytes, read * 2 * 16 * 4)  # KV heads, channels, float32


def test_mean_key_selection_differs_and_is_full_attention_with_a_full_budget():
    model, tokens = tiny(3), token_ids(2, 60)
    fields = {"page_size": 8, "dense_layers": 1, "window": 2}
    bounds = forced_logits(model, rj.DecodeConfig(budget_tokens=24, **fields), tokens, (21, 44), STEPS)
    fields |= {"statistics": "mean_key", "score": "mean_key"}
    mean = forced_logits(model, rj.DecodeConfig(budget_tokens=24, **fields), tokens, (21, 44), STEPS)
    assert np.abs(mean - bounds).max() > 1e-3
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    whole = forced_logits(model, rj.DecodeConfig(budget_tokens=64, **fields), tokens, (21, 44), STEPS)
    np.testing.assert_allclose(whole[:, 1], expected[1, 44 : 44 + STEPS], atol=ATOL)


def test_the_budget_is_a_share_with_a_floor_or_a_number_of_tokens():
    context = jnp.array([1, 320, 1706, 1707, 4096, 131072])
    share = rj.DecodeConfig(budget=0.15, budget_floor=256)
    # 0.15 * 1707 = 256.05 tokens round to 256; 0.15 * 4096 = 614.4 to 614, 39 pages.
    assert pages_of(share, context) == [16, 16, 16, 16, 39, 1229]
    assert pages_of(rj.DecodeConfig(budget_tokens=250), context) == [16] * 6
    for pages in (1, 7, 99, 100, 599):
        most = max(pages_of(share, jnp.arange(1, pages * 16 + 1)))
        assert most_pages(share, pages, 64, 2) >= min(most, pages)


def test_statistics_that_take_less_leave_room_for_pages_at_the_same_traffic():
    context = jnp.array([64, 4096, 8192])
    fields = {"budget_tokens": 256, "budget_covers": "traffic"}
    assert pages_of(rj.DecodeConfig(**fields), context) == [16, 16, 16]
    # 256 pages of 4096 tokens save one vector each: 8 pages of 32 vectors.
    mean_key = rj.DecodeConfig(score="mean_key", **fields)
    assert pages_of(mean_key, context) == [16, 24, 32]
    # Quest reads 2 * 256 + 512 vectors. 512 mean keys take (64 + 4) / 128 vectors in 8 bits, 64 blocks one
    # each, the block that settles one: 272 + 64 + 1. What is left are 42 pages of 16 vectors.
    fields |= {"score": "mean_key", "statistics": "mean_key_int8", "residual_pages": 8, "page_size": 8}
    small = rj.DecodeConfig(**fields)
    assert pages_of(small, context)[1] == 42
    for pages in (8, 64, 1024):
        most = max(pages_of(small, jnp.arange(1, pages * 8 + 1)))
        assert min(most, pages) <= most_pages(small, pages, 64, 2) <= min(most + 1, pages)


def test_sequences_of_one_batch_may_have_different_budgets():
    model, tokens = tiny(3), np.repeat(token_ids(1, 60), 2, axis=0)
    configs = [rj.DecodeConfig("retro", page_size=8, budget_tokens=n, dense_layers=1) for n in (24, 40)]
    alone = [forced_logits(model, config, tokens[:1], [37], STEPS)[:, 0] for config in configs]
    state, _ = begin(model, configs[1], tokens, [37, 37], 60)
    state = state.replace(budget=state.budget.replace(floor=jnp.array([24, 40])))
    together = force(model, configs[1], state, tokens, STEPS)[1]
    for row in range(2):
        np.testing.assert_allclose(together[:, row], alone[row], atol=ATOL)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def pages_of(config, context, head_dim=64, itemsize=2):
    budget = Budget.of(config, len(context))
    return budget_pages(config, budget, context, head_dim, itemsize).tolist()
