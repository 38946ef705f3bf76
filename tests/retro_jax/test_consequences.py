"""What follows from the definition of a decode step, each as a test on a small random model."""

import dataclasses
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels.attention import api as attention
from pallas_kernels.selection import api as selection
from pallas_kernels.update import api as update
from retro_jax import models
from tests.retro_jax.tiny import (
    ATOL,
    CENTROIDS,
    assert_decided,
    assert_same_tokens,
    begin,
    first_sparse_qkv,
    force,
    forced_logits,
    step,
    tiny,
    token_ids,
)

WINDOWS = (1, 2, 3, 8)
GROUPS = (1, 3, 4)
PAGE_SIZES = (8, 16)
LENGTHS = (2, 13, 37)  # shorter than a window, than a page, and off every page boundary
STEPS = 20
ROOM = 120
"""Tokens of a text and of its cache, in as many tests as can be, which then share their programs."""


def sparse(window: int, page_size: int, **fields) -> rj.DecodeConfig:
    """Three pages per step: far fewer than there are, so that every difference shows."""
    fields = {"method": "retro", "budget_tokens": 3 * page_size, "dense_layers": 1} | fields
    return rj.DecodeConfig(window=window, page_size=page_size, **fields)


@pytest.mark.parametrize(
    ("window", "group", "page_size", "fields"),
    [
        *((*sizes, {}) for sizes in itertools.product(WINDOWS, GROUPS, PAGE_SIZES)),
        *((window, 3, 8, CENTROIDS) for window in (1, 3)),
    ],
)
def test_with_a_budget_of_all_pages_it_is_full_attention(window, group, page_size, fields):
    model, tokens = tiny(group), token_ids(3, 60)
    expected = np.asarray(models.forward(model.params, model.config, tokens))
    config = sparse(window, page_size, budget_tokens=64, **fields)
    logits = forced_logits(model, config, tokens, LENGTHS, STEPS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], expected[row, length : length + STEPS], atol=ATOL)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_window_of_one_is_quest(group, page_size):
    model, tokens = tiny(group), token_ids(3, ROOM)
    quest = sparse(1, page_size, method="quest")
    expected = forced_logits(model, quest, tokens, LENGTHS, 50)
    np.testing.assert_array_equal(forced_logits(model, sparse(1, page_size), tokens, LENGTHS, 50), expected)
    full = np.asarray(models.forward(model.params, model.config, tokens))
    assert np.abs(full[2, LENGTHS[2] + 49] - expected[49, 2]).max() > 0.01  # the budget binds


@pytest.mark.parametrize(
    ("group", "fields"), (*((group, {}) for group in GROUPS), (3, {"score": "mean_key"}))
)
def test_without_overwriting_it_is_quest(group, fields):
    model, tokens = tiny(group), token_ids(3, ROOM)
    expected = forced_logits(model, sparse(1, 8, method="quest", **fields), tokens, LENGTHS, 50)
    for window in WINDOWS[1:]:
        kept = forced_logits(model, sparse(window, 8, overwrite=False, **fields), tokens, LENGTHS, 50)
        np.testing.assert_allclose(kept, expected, atol=ATOL)
    overwritten = forced_logits(model, sparse(3, 8, **fields), tokens, LENGTHS, 50)
    assert np.abs(overwritten - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("window", "group", "page_size", "fields"),
    [
        *((*sizes, {}) for sizes in itertools.product((2, 3, 8), GROUPS, PAGE_SIZES)),
        (3, 3, 8, {"score": "mean_key", "residual_pages": 2}),  # estimates are not in the output cache
    ],
)
def test_in_the_first_sparse_layer_outputs_are_attention_over_the_union_of_page_sets(
    window, group, page_size, fields
):
    model, tokens, dense, steps = tiny(group), token_ids(3, ROOM), 1, 24
    lengths = (2, 13, 91)
    config = sparse(window, page_size, dense_layers=dense, **fields)
    state, _ = begin(model, config, tokens, lengths, ROOM)
    loaded = []  # per step: bool [B, K, P]

    def observe(state):
        last = np.asarray(state.layers[dense].last_loaded)
        loaded.append(last == np.asarray(state.length - 1)[:, None, None])

    state, _ = force(model, config, state, tokens, steps, observe)
    q, k, v = (np.asarray(a, np.float64) for a in first_sparse_qkv(model.params, model.config, tokens, dense))
    outputs = state.layers[dense].outputs
    for row, length in enumerate(lengths):
        for slot in range(window - 1):
            age = window - 2 - slot  # the newest query has been pushed
            position = length + steps - 1 - age
            union = np.any([pages[row] for pages in loaded[steps - 1 - age :]], axis=0)  # [K, P]
            o, lse = _attend(q[row, position], k[row], v[row], union, position, page_size)
            np.testing.assert_allclose(outputs.o[row, slot], o, atol=ATOL)
            np.testing.assert_allclose(outputs.lse[row, slot], lse, atol=ATOL)
    assert any(np.any(old & ~new) for old, new in itertools.pairwise(loaded))  # page sets differ


def _attend(q, k, v, pages, position, page_size):
    """Softmax attention of one query q[N, D] over the tokens of `pages`[K, P] up to `position`."""
    group = q.shape[0] // k.shape[1]
    outputs, sums = [], []
    for head, query in enumerate(q):
        tokens = np.flatnonzero(np.repeat(pages[head // group], page_size)[: position + 1])
        scores = k[tokens, head // group] @ query / np.sqrt(len(query))
        lse = np.log(np.sum(np.exp(scores)))
        outputs.append(np.exp(scores - lse) @ v[tokens, head // group])
        sums.append(lse)
    return np.stack(outputs), np.stack(sums)


@pytest.mark.parametrize(("window", "fields"), ((1, {}), (3, {}), (3, CENTROIDS)))
def test_a_scan_is_its_steps_and_a_saved_state_goes_on(window, fields):
    model, tokens = tiny(3), token_ids(3, ROOM)
    config = sparse(window, 8, **fields)
    scan = jax.jit(rj.decode, static_argnames=("model", "config", "steps"))

    def run(state, first, steps):
        return scan(model.params, model.config, config, state, first, steps=steps)

    state, logits = begin(model, config, tokens, LENGTHS, ROOM)
    assert_decided(logits)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    whole_state, whole = run(state, first, 24)

    half_state, half = run(state, first, 12)
    restored = flax.serialization.from_bytes(half_state, flax.serialization.to_bytes(half_state))
    end_state, rest = run(restored, half.pending, 12)
    np.testing.assert_array_equal(np.concatenate([half.tokens, rest.tokens], axis=1), whole.tokens)

    stepped, newest, chosen = state, first, []
    for _ in range(24):
        stepped, logits = step(model.params, model.config, config, stepped, newest)
        assert_decided(logits)
        newest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        chosen.append(newest)
    np.testing.assert_array_equal(np.stack(chosen, axis=1), whole.tokens)
    for resumed in (end_state, stepped):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL),
            jax.tree.leaves(resumed),
            jax.tree.leaves(whole_state),
        )


@pytest.mark.parametrize(
    ("method", "window", "fields"),
    (("full", 1, {}), ("retro", 1, {}), ("retro", 3, {}), ("retro", 3, CENTROIDS)),
)
def test_a_sequence_depends_neither_on_its_batch_nor_on_the_capacity(method, window, fields):
    model, tokens = tiny(3), token_ids(3, ROOM)
    config = rj.DecodeConfig("full", page_size=8) if method == "full" else sparse(window, 8, **fields)
    together = forced_logits(model, config, tokens, LENGTHS, STEPS)
    larger = forced_logits(model, config, tokens, LENGTHS, STEPS, capacity=200)
    np.testing.assert_allclose(larger, together, atol=ATOL)
    for row, length in enumerate(LENGTHS):
        alone = forced_logits(model, config, tokens[row : row + 1], [length], STEPS)
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=ATOL)


@pytest.mark.parametrize(
    ("method", "window", "fields"),
    (("full", 1, {}), *(("retro", window, {}) for window in WINDOWS), ("retro", 3, CENTROIDS)),
)
def test_what_lies_beyond_a_sequence_is_never_read(method, window, fields):
    model, tokens = tiny(3), token_ids(3, ROOM)
    config = rj.DecodeConfig("full", page_size=8) if method == "full" else sparse(window, 8, **fields)
    clean, _ = begin(model, config, tokens, LENGTHS, ROOM)
    beyond = np.arange(clean.capacity).reshape(-1, 8) >= np.asarray(clean.length)[:, None, None]  # [B, P, S]

    def poison(layer):
        pages = jnp.where(beyond[:, None, :, None, :, None], jnp.nan, layer.pages)
        if layer.statistics is None:
            return layer.replace(pages=pages)
        unused = beyond.all(axis=-1)[:, None, :, None, None]
        if config.residual_pages:
            scales = jnp.where(unused[..., 0], jnp.nan, layer.statistics.scales)
            blocks = np.arange(layer.block_values.shape[2]) * 16 + 16 > np.asarray(clean.length)[:, None]
            values = jnp.where(blocks[:, None, :, None], jnp.nan, layer.block_values)
            statistics = layer.statistics.replace(scales=scales)
            return layer.replace(pages=pages, statistics=statistics, block_values=values)
        values = jnp.where(unused, jnp.nan, layer.statistics.values)
        return layer.replace(pages=pages, statistics=layer.statistics.replace(values=values))

    poisoned = jax.tree.map(jnp.copy, clean.replace(layers=tuple(map(poison, clean.layers))))
    assert np.isnan(poisoned.layers[-1].pages).any()
    np.testing.assert_array_equal(
        force(model, config, poisoned, tokens, STEPS)[1], force(model, config, clean, tokens, STEPS)[1]
    )


@pytest.mark.parametrize(("window", "fields"), ((1, {}), (3, {}), (3, CENTROIDS)))
def test_a_sequence_that_is_not_active_changes_nothing(window, fields):
    model, tokens = tiny(3), token_ids(3, ROOM)
    config = sparse(window, 8, **fields)
    state, _ = force(model, config, begin(model, config, tokens, [9, 30, 13], ROOM)[0], tokens, 5)
    before = jax.tree.map(np.asarray, state)
    active = jnp.array([True, False, True])
    after, _ = step(model.params, model.config, config, state, jnp.array([3, 4, 5]), active)
    assert list(after.length) == [15, 35, 19]
    assert not np.array_equal(after.layers[-1].pages[0], before.layers[-1].pages[0])
    for new, old in zip(
        jax.tree.leaves(after.replace(metrics=None)),
        jax.tree.leaves(before.replace(metrics=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(new[1], old[1])
    assert after.metrics.kv_bytes[1] == 0 and after.metrics.pages_attended[1].sum() == 0


def test_settled_blocks_are_the_mean_of_their_values_in_the_cache():
    model, tokens, lengths = tiny(3), token_ids(3, ROOM), np.array([9, 30, 13])
    config = sparse(3, 8, **CENTROIDS)
    state, _ = begin(model, config, tokens, lengths, ROOM)

    def check(state, settled):
        for layer in state.layers[config.dense_layers :]:
            for row, count in enumerate(settled):
                for block in range(count // 16):
                    values = layer.pages[row, :, 2 * block : 2 * block + 2, 1]
                    got = layer.block_values[row, :, block]
                    np.testing.assert_allclose(got, values.mean(axis=(1, 2)), atol=1e-6)

    check(state, lengths)
    state, _ = force(model, config, state, tokens, 26)
    check(state, lengths + 26 - 2)  # the window's older tokens may still change


@pytest.mark.parametrize(
    ("method", "mesh_shape", "fields"),
    (
        ("full", (2, 2), {}),
        ("retro", (1, 2), {}),
        ("retro", (2, 2), {}),
        ("retro", (4, 1), {}),
        ("retro", (2, 2), CENTROIDS),
    ),
)
def test_sharded_is_unsharded(method, mesh_shape, fields):
    model, tokens, lengths = tiny(3), token_ids(4, 60), (2, 13, 37, 20)
    config = rj.DecodeConfig("full", page_size=8) if method == "full" else sparse(3, 8, **fields)
    expected = forced_logits(model, config, tokens, lengths, STEPS)
    mesh = rj.make_mesh(*mesh_shape)
    sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    state, _ = begin(model, config, tokens, lengths, 60)
    state = rj.shard_state(state, model.config, mesh)
    assert len(state.layers[0].pages.sharding.device_set) == mesh.size
    state, logits = force(sharded, config, state, tokens, STEPS)
    np.testing.assert_allclose(logits, expected, atol=ATOL)
    pages = state.layers[-1].pages
    assert pages.sharding.shard_shape(pages.shape)[:2] == (4 // mesh_shape[0], 2 // mesh_shape[1])


def test_a_model_on_a_mesh_generates_there():
    model, ids = tiny(3), token_ids(2, 40)
    mesh = rj.make_mesh(2, 2)
    sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    prompts, config = [row.tolist() for row in ids], sparse(3, 8)
    expected = rj.generate(model, prompts, config, 12, stop_tokens=[])
    result = rj.generate(sharded, prompts, config, 12, stop_tokens=[])
    for prompt, *tokens in zip(prompts, result.tokens, expected.tokens, strict=True):
        assert_same_tokens(model, config, prompt, *tokens)
    pages = result.state.layers[-1].pages
    assert pages.sharding.shard_shape(pages.shape)[:2] == (1, 1)


@pytest.mark.parametrize("method", ("full", "retro"))
def test_kernels_are_spread_over_a_mesh(method, monkeypatch):
    """The references stand in for kernels, which a CPU does not run, and see a device's own part."""
    seen = set()

    def stand_in(name, reference):
        def kernel(*args, **kwargs):
            seen.add(
                (name, next(array for array in jax.tree.leaves(args) if array.ndim >= 5).shape[:2])
            )  # of pages, statistics
            return reference(*args, **kwargs)

        return kernel

    for module, names in (
        (attention, ("attend_window", "dense_attention")),
        (selection, ("select_pages",)),
        (update, ("update_pages", "update_from_product")),
    ):
        for name in names:
            kernel = stand_in(name, getattr(module.reference, name))
            monkeypatch.setattr(module.mosaic_gpu, name, kernel)
    for module in ("pallas_kernels.dispatch", "retro_jax.heads"):
        monkeypatch.setattr(f"{module}.kernels_of_device", lambda: "mosaic_gpu")
    model, tokens, lengths = tiny(3), token_ids(4, 60), (2, 13, 37, 20)
    config = rj.DecodeConfig("full", page_size=8) if method == "full" else sparse(3, 8)
    # A configuration of this test alone, since layers are traced once in a process.
    config = dataclasses.replace(config, score_seed=1)
    expected = forced_logits(model, dataclasses.replace(config, implementation="xla"), tokens, lengths, STEPS)
    mesh = rj.make_mesh(2, 2)
    sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    state, _ = begin(model, config, tokens, lengths, 60)
    state = rj.shard_state(state, model.config, mesh)
    with jax.set_mesh(mesh):
        state, logits = force(sharded, config, state, tokens, STEPS)
    np.testing.assert_allclose(logits, expected, atol=ATOL)
    operations = {"update_from_product", "dense_attention"}
    if method == "retro":
        operations |= {"select_pages", "attend_window"}
    assert seen == {(name, (2, 1)) for name in operations}


def test_a_mesh_that_does_not_divide_is_refused():
    model = tiny(3)
    with pytest.raises(ValueError, match=r"num_kv_heads 2 does not divide over 4 .*one of 1, 2"):
        rj.shard_params(model.params, model.config, rj.make_mesh(1, 4))
    with pytest.raises(ValueError, match=r"5 x 1 devices were asked for, 4 are there"):
        rj.make_mesh(5, 1)
    with pytest.raises(ValueError, match=r"axes \('data',\).*use make_mesh"):
        rj.shard_params(model.params, model.config, jax.make_mesh((4,), ("data",)))
    with pytest.raises(ValueError, match=r"Explicit.*use make_mesh"):
        rj.shard_params(model.params, model.config, jax.make_mesh((1, 2), ("data", "model")))
