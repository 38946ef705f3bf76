"""What follows from the definition of a decode step, for a model whose layers are of several kinds.

One step is compiled for nearly all of it: budgets are run-time values, and a sequence's mates its neighbours.
"""

import functools
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.budget import Budget
from retro_jax.models import LayerKind, ModelConfig, Rope
from retro_jax.plan import layer_plan
from retro_jax.verify import verified_step
from tests.retro_jax.tiny import ATOL, VOCAB, force, prefill, token_ids

SIZE, ROOM, STEPS, DENSE = 8, 120, 64, 1
LENGTHS = (2, 13, 41, 30)
FULL, NARROW = LayerKind(Rope(1000.0), sinks=True), LayerKind(Rope(50.0), window=5)
WIDE = LayerKind(Rope(100.0), window=19, sinks=True)  # no whole pages, and more than two
KINDS = (WIDE, FULL, FULL, NARROW, FULL)
SPARSE = 2
"""The first sparse layer: the first one with full attention is dense, and one below it has a window."""


@functools.cache
def mixed(kinds=KINDS, kv_heads: int = 2) -> rj.Model:
    config = ModelConfig(
        "mixed", VOCAB, len(kinds), 2 * kv_heads, kv_heads, 8, 16, 24, 250, layer_kinds=kinds
    )
    return rj.Model(config, models.random_params(config, jax.random.key(5)), tokenizer=None)


CONFIG = rj.DecodeConfig(
    "retro", window=3, page_size=SIZE, budget_tokens=ROOM, dense_layers=DENSE, prefill_chunk=16
)
FEW = 3 * SIZE


def begin(tokens, lengths=LENGTHS, budget: int = ROOM, config: rj.DecodeConfig = CONFIG, model=None):
    """The state after prompts in four chunks, which are longer than some windows, with a run-time budget."""
    model, lengths = model or mixed(), np.asarray(lengths, np.int32)
    prompts = np.where(np.arange(64) < lengths[:, None], tokens[:, :64], 0)
    state, logits = prefill(model.params, model.config, config, prompts, lengths, capacity=ROOM)
    floor = jnp.full_like(state.budget.floor, budget)
    return state.replace(budget=Budget(state.budget.share, floor)), logits


@functools.cache
def expected() -> np.ndarray:
    model = mixed()
    return np.asarray(models.forward(model.params, model.config, token_ids(4, ROOM)))


def test_with_a_budget_of_all_pages_it_is_the_dense_model_far_beyond_its_windows():
    tokens = token_ids(4, ROOM)
    state, first = begin(tokens)
    state, logits = force(mixed(), CONFIG, state, tokens, STEPS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(first[row], expected()[row, length - 1], atol=ATOL)
        np.testing.assert_allclose(logits[:, row], expected()[row, length : length + STEPS], atol=ATOL)
    # All of the sparse layers' pages and of the dense layer's context, and the latest tokens of each window.
    context, rings = np.array(LENGTHS) + STEPS, (19, 7)
    tokens = sum(np.minimum(context, ring) for ring in rings) + context + 2 * SIZE * -(-context // SIZE)
    bounds = 2 * 2 * -(-context // SIZE)
    assert state.metrics.kv_bytes.tolist() == ((2 * tokens + bounds) * 2 * 8 * 4).tolist()


def test_revisions_overwrite_windows_too_and_in_the_first_sparse_layer_outputs_are_over_unions():
    model, tokens = mixed(), token_ids(4, ROOM)
    state, _ = begin(tokens, budget=FEW)
    written, loaded = [], []

    def observe(state):
        loaded.append(np.asarray(state.layers[SPARSE].last_loaded == (state.length - 1)[:, None, None]))
        written.append(np.asarray(state.layers[3].pages))

    state, logits = force(model, CONFIG, state, tokens, 24, observe)
    assert np.abs(logits[-1, 2] - expected()[2, LENGTHS[2] + 23]).max() > 1e-3  # the budget binds
    # The narrow window above: a token's key changes in the two steps that revise it, and then stays.
    changes = []
    for step in range(20):
        page, place = divmod((LENGTHS[2] + step) % 7, SIZE)
        keys = [pages[2, :, page, 0, place] for pages in written[step : step + 4]]
        changes.append([np.abs(after - before).max() for before, after in itertools.pairwise(keys)])
    revised, again, left = np.max(changes, axis=0)
    assert min(revised, again) > 1e-4 and left == 0

    q, k, v = (np.asarray(part, np.float64) for part in _sparse_qkv(model.params, model.config, tokens))
    outputs = state.layers[SPARSE].outputs
    for row, length in enumerate(LENGTHS):
        for slot, age in enumerate((1, 0)):
            position = length + 23 - age
            union = np.any([pages[row] for pages in loaded[23 - age :]], axis=0)
            for head in range(4):
                seen = np.flatnonzero(np.repeat(union[head // 2], SIZE)[: position + 1])
                scores = k[row, seen, head // 2] @ q[row, position, head] * 8**-0.5
                lse = np.log(np.sum(np.exp(scores)))
                o = np.exp(scores - lse) @ v[row, seen, head // 2]
                np.testing.assert_allclose(outputs.o[row, slot, head], o, atol=ATOL)  # without the sink
                np.testing.assert_allclose(outputs.lse[row, slot, head], lse, atol=ATOL)


@functools.partial(jax.jit, static_argnames="model")
def _sparse_qkv(params, model, tokens):
    """q, k, v of the first sparse layer, by the dense layers below it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = models.embed(params, model, tokens)
    for layer, kind in zip(params.layers[:SPARSE], model.layers, strict=False):
        q, k, v = models.qkv(layer, model, kind, x, positions)
        o = models.transformer.causal_attention(q, k, v, kind.window, layer.sinks)
        x = models.mlp(layer, model, models.attention_output(layer, model, x, o))
    return models.qkv(params.layers[SPARSE], model, model.layers[SPARSE], x, positions)


def test_a_sequence_depends_neither_on_its_mates_nor_on_what_its_places_held():
    """Nor does one that is not active change."""
    model, tokens = mixed(), token_ids(4, ROOM)
    clean = begin(tokens, budget=FEW)[0]
    logits = force(model, CONFIG, jax.tree.map(jnp.copy, clean), tokens, 12)[1]
    others = np.concatenate([token_ids(2, ROOM, seed=1), tokens[2:]])
    with_others = force(model, CONFIG, begin(others, (37, 8, 41, 30), FEW)[0], others, 12)[1]
    np.testing.assert_allclose(with_others[:, 2:], logits[:, 2:], atol=ATOL)

    def poison(layer, ring):
        """NaN in every place that no token of the cache lies in."""
        places = np.arange(layer.pages.shape[2] * SIZE).reshape(-1, SIZE)
        end = np.minimum(np.asarray(clean.length), ring or ROOM)[:, None, None]
        unused = (places >= end)[:, None, :, None, :, None]
        return layer.replace(pages=jnp.where(unused, jnp.nan, layer.pages))

    rings = layer_plan(model.config, CONFIG).rings
    poisoned = clean.replace(layers=tuple(map(poison, clean.layers, rings)))
    assert all(np.isnan(layer.pages).any() for layer in poisoned.layers)
    poisoned = poisoned.replace(
        layers=tuple(
            layer if ring else layer.replace(pages=old.pages)  # theirs is another test
            for layer, old, ring in zip(poisoned.layers, clean.layers, rings, strict=True)
        )
    )
    np.testing.assert_array_equal(force(model, CONFIG, poisoned, tokens, 12)[1], logits)


def test_a_saved_state_goes_on():
    model, tokens = mixed(), token_ids(4, ROOM)
    state, _ = force(model, CONFIG, begin(tokens, budget=FEW)[0], tokens, 5)
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert restored.capacity == state.capacity == 128
    np.testing.assert_array_equal(
        force(model, CONFIG, restored, tokens, 6)[1], force(model, CONFIG, state, tokens, 6)[1]
    )


def test_sharded_is_unsharded():
    model, tokens, mesh = mixed(), token_ids(4, ROOM), rj.make_mesh(2, 2)
    sharded = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    assert sharded.params.layers[0].sinks.sharding.shard_shape((4,)) == (2,)
    state, _ = begin(tokens, budget=FEW)
    alone = force(model, CONFIG, jax.tree.map(jnp.copy, state), tokens, 12)[1]
    state, logits = force(sharded, CONFIG, rj.shard_state(state, model.config, mesh), tokens, 12)
    np.testing.assert_allclose(logits, alone, atol=ATOL)
    pages = state.layers[0].pages
    assert pages.sharding.shard_shape(pages.shape)[:2] == (2, 1)


def test_what_rejected_drafts_overwrite_is_put_back():
    """Every round leaves the rings that a prompt of its tokens has, in 8 bits as well; one KV head."""
    sharp = LayerKind(None, scale=3.0, sinks=True)  # so that drafts miss what their few pages lack
    model, tokens = mixed((NARROW, sharp), 1), token_ids(4, ROOM)
    config = rj.DecodeConfig(
        "quest", page_size=SIZE, budget_tokens=2 * SIZE, dense_layers=0, prefill_chunk=16, cache_dtype="int8"
    )
    run = jax.jit(verified_step, static_argnames=("model", "config", "k"))
    state, logits = begin(tokens, budget=2 * SIZE, config=config, model=model)
    pending = jnp.argmax(logits, -1).astype(jnp.int32)
    texts = [list(row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    kept = []
    for _ in range(4):
        before = np.asarray(pending)
        state, out = run(model.params, model.config, config, state, pending, k=3)
        kept.append(np.asarray(out.emitted).sum(axis=1))
        for text, first, chosen, count in zip(texts, before, np.asarray(out.tokens), kept[-1], strict=True):
            text += [first, *chosen[: count - 1]]
        pending = out.pending
    assert np.min(kept) < 4  # some drafts were rejected
    lengths = np.array([len(text) for text in texts])
    assert state.length.tolist() == lengths.tolist()
    rows = np.stack([np.resize(text, 64) for text in texts])
    whole, _ = begin(rows, lengths, 2 * SIZE, config, model)
    for row, length in enumerate(lengths):
        for position in range(length - 5, length):
            place = position % 5
            at = row, slice(None), place // SIZE, slice(None), place % SIZE
            got, want = (
                jax.tree.map(lambda array, at=at: array[at], s.layers[0].pages) for s in (state, whole)
            )
            np.testing.assert_allclose(got.at("float32"), want.at("float32"), atol=0.05)
    with pytest.raises(
        ValueError, match=r"verify 5 .* do not fit the 5 tokens that are kept .* of mixed; use a sm"
    ):
        run(model.params, model.config, config, state, pending, k=5)
