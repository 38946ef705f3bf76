"""Which pages each method chooses, against NumPy in float64 on the first sparse layer of a random model.

Below that layer everything is dense, so its queries and keys are known without decoding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from tests.pallas_kernels import oracle
from tests.pallas_kernels.page_sets import distance
from tests.retro_jax.tiny import ATOL, begin, first_sparse_qkv, force, step, tiny, token_ids

SIZE, BUDGET, CACHE, PAGES, OBSERVED = 8, 3, 5, 16, 10
LENGTHS, STEPS = (13, 70), 40
FIELDS = {"page_size": SIZE, "budget_tokens": 24, "dense_layers": 1, "observation": OBSERVED}
FIELDS |= {"prefill_chunk": 16}


def decode(config, alive=None):
    """Pages that the sparse layer loaded, by row, step and KV head; its queries and keys; the last state.

    `alive` takes, step by step, which pages eviction left: bool [B, K, P].
    """
    model, tokens = tiny(3, layers=2), token_ids(2, 120)
    loads = []

    def observe(state):
        newest = np.asarray(state.length) - 1
        loads.append(np.asarray(state.layers[1].last_loaded) == newest[:, None, None])
        if alive is not None:
            alive.append(np.asarray(state.layers[1].kept.alive))

    state, _ = force(model, config, begin(model, config, tokens, LENGTHS, 120)[0], tokens, STEPS, observe)
    q, k, _ = (np.asarray(a, np.float64) for a in first_sparse_qkv(model.params, model.config, tokens, 1))
    chosen = [[[set(np.flatnonzero(head)) for head in step[row]] for step in loads] for row in range(2)]
    return chosen, q, k, state


def page_mass(q, k, position, pages):
    """The softmax weights of one group's queries q[G, D] at `position` by page, over `pages`; their mean."""
    tokens = [t for t in range(position + 1) if t // SIZE in pages]
    mass = np.zeros(PAGES)
    for query in q:
        logits = k[tokens] @ query / np.sqrt(len(query))
        weights = np.exp(logits - logits.max())
        np.add.at(mass, np.array(tokens) // SIZE, weights / weights.sum() / len(q))
    return mass


def best(scores, pages, limit, newest):
    """The limit's best of `pages`, the first and the newest among them, ties to the lower page."""
    ranked = sorted(pages, key=lambda page: (page not in (0, newest), -scores[page], page))
    return set(ranked[:limit])


def each_head(q, k):
    """(row, head, the group's queries[T, G, D], the head's keys[T, D])."""
    for row in range(2):
        for head in range(2):
            yield row, head, q[row, :, head * 3 : head * 3 + 3], k[row, :, head]


def same(got, expected, scores, newest):
    """The pages `got`, which are the expected ones but for some within rounding of the last one chosen.

    Queries and keys of the float32 decode step round, and so do scores: as logits do, by `ATOL` at order one.
    """
    assert distance(got, expected, scores, np.maximum(np.abs(scores), 1), {0, newest}) <= ATOL
    return got


def begun(position):
    return set(range(position // SIZE + 1))


def test_streaming_keeps_the_sink_and_recent_pages():
    chosen, *_ = decode(rj.DecodeConfig("streaming", **FIELDS))
    for row, length in enumerate(LENGTHS):
        for number, heads in enumerate(chosen[row]):
            newest = (length + number) // SIZE
            assert heads == [{0, newest, max(newest - 1, 0)}] * 2


@pytest.mark.parametrize("group_reduce", ("mean", "max"))
def test_tova_drops_the_page_that_the_query_before_attended_to_least(group_reduce):
    chosen, q, k, _ = decode(rj.DecodeConfig("tova", group_reduce=group_reduce, **FIELDS))
    for row, head, queries, keys in each_head(q, k):
        length, alive = LENGTHS[row], begun(LENGTHS[row] - 1)
        for position in range(length, length + STEPS):
            before = queries[position - 1][:, None]  # one query head at a time
            mass = [page_mass(query, keys, position - 1, alive) for query in before]
            mass = np.mean(mass, axis=0) if group_reduce == "mean" else np.max(mass, axis=0)
            newest = position // SIZE
            alive = best(mass, alive | {newest}, BUDGET, newest)
            alive = same(chosen[row][position - length][head], alive, mass, newest)


def test_h2o_keeps_heavy_hitters_of_all_queries_and_recent_pages():
    config = rj.DecodeConfig("h2o", **FIELDS | {"budget_tokens": 40})
    chosen, q, k, state = decode(config)
    for row, head, queries, keys in each_head(q, k):
        length, alive = LENGTHS[row], begun(LENGTHS[row] - 1)
        mass = sum(page_mass(queries[p], keys, p, begun(p)) for p in range(length))
        for position in range(length, length + STEPS):
            newest = position // SIZE
            recent = np.where(np.arange(PAGES) > newest - 2, np.inf, mass)  # half of 5 pages
            alive = best(recent, alive | {newest}, 5, newest)
            alive = same(chosen[row][position - length][head], alive, recent, newest)
            mass += page_mass(queries[position], keys, position, alive)
        left = sorted(alive)
        np.testing.assert_allclose(
            state.layers[1].kept.mass[row, head][np.array(left)], mass[left], rtol=1e-4
        )


def test_snapkv_keeps_what_the_last_prompt_queries_vote_for_and_grows():
    chosen, q, k, _ = decode(rj.DecodeConfig("snapkv", **FIELDS | {"budget_tokens": 48}))
    for row, head, queries, keys in each_head(q, k):
        length = LENGTHS[row]
        voters = range(length - OBSERVED, length)
        votes = sum(page_mass(queries[p], keys, p, begun(p)) for p in voters)
        votes[voters[0] // SIZE :] = np.inf
        first = length // SIZE
        kept = same(chosen[row][0][head], best(votes, begun(length), 6, first), votes, first)
        for number in range(STEPS):
            expected = kept | {page for page in begun(length + number) if page > first}
            assert chosen[row][number][head] == expected


def test_the_oracle_selects_by_exact_attention():
    chosen, q, k, _ = decode(rj.DecodeConfig("quest", score="oracle", **FIELDS))
    for row, head, queries, keys in each_head(q, k):
        for number in range(STEPS):
            position = LENGTHS[row] + number
            mass = page_mass(queries[position], keys, position, begun(position))
            newest = position // SIZE
            same(chosen[row][number][head], best(mass, begun(position), BUDGET, newest), mass, newest)


@pytest.mark.parametrize("rule", ("tova", "h2o"))
def test_retro_attention_selects_among_the_pages_that_eviction_leaves(rule):
    config = rj.DecodeConfig("retro", window=3, evict=rule, cache_tokens=CACHE * SIZE, **FIELDS)
    left = []
    chosen, q, k, _ = decode(config, left)
    for row, head, queries, keys in each_head(q, k):
        length, alive = LENGTHS[row], begun(LENGTHS[row] - 1)
        prompt = range(length) if rule == "h2o" else [length - 1]
        mass = sum(page_mass(queries[p], keys, p, begun(p)) for p in prompt)
        for position in range(length, length + STEPS):
            newest, priority = position // SIZE, mass
            if rule == "h2o":
                priority = np.where(np.arange(PAGES) > newest - 2, np.inf, mass)
            alive = best(priority, alive | {newest}, CACHE, newest)
            now = set(np.flatnonzero(left[position - length][row, head])) & begun(position)
            alive = same(now, alive, priority, newest)
            scores = np.full(PAGES, -np.inf)
            for page in alive:
                scores[page] = _bound(queries[position], keys, page, position)
            loaded = best(scores, alive, BUDGET, newest)
            loaded = same(chosen[row][position - length][head], loaded, scores, newest)
            fresh, pages = page_mass(queries[position], keys, position, loaded), sorted(loaded)
            mass[pages] = fresh[pages] + (mass[pages] if rule == "h2o" else 0)


def _bound(queries, keys, page, position):
    vectors = oracle.statistics(keys[page * SIZE : min((page + 1) * SIZE, position + 1)], "min_max")
    return np.mean([oracle.page_score(query, vectors, "bounds") for query in queries])


def test_random_pages_depend_on_seed_position_and_head_only_and_are_uniform():
    def pages(seed):
        return decode(rj.DecodeConfig("quest", score="random", score_seed=seed, **FIELDS))[0]

    chosen, again, other = pages(0), pages(0), pages(1)
    assert chosen == again and chosen != other
    assert any(heads[0] != heads[1] for heads in chosen[1])
    free = [
        head - {0, (LENGTHS[1] + number) // SIZE} for number, heads in enumerate(chosen[1]) for head in heads
    ]
    counts = np.bincount([page for head in free for page in head], minlength=9)[1:9]
    # 80 draws of one page out of 8 to 12: about 8 each; 20 would be five deviations away.
    assert counts.sum() > 40 and counts.min() > 0 and counts.max() < 20


def test_layers_draw_different_random_pages():
    model, tokens = tiny(3), token_ids(2, 60)
    config = rj.DecodeConfig("quest", score="random", page_size=SIZE, budget_tokens=24, dense_layers=1)
    state, _ = force(model, config, begin(model, config, tokens, (9, 30), 60)[0], tokens, 12)
    assert (state.layers[1].last_loaded[1] != state.layers[2].last_loaded[1]).any()


def test_a_growing_share_brings_no_page_back():
    fields = {"page_size": SIZE, "budget": 0.4, "budget_floor": 16, "dense_layers": 1}
    chosen, *_ = decode(rj.DecodeConfig("streaming", **fields))
    budgets = [-(-round(0.4 * (70 + number + 1)) // SIZE) for number in range(STEPS)]
    assert budgets[-1] > budgets[0]
    before = None
    for number, (pages, _) in enumerate(chosen[1]):
        newest = (70 + number) // SIZE
        assert len(pages) <= budgets[number]
        if before is not None:
            assert pages <= before | {newest}
        before = pages


@pytest.mark.parametrize("method", ("h2o", "snapkv"))
def test_a_next_turn_does_not_see_evicted_pages(method):
    model, tokens = tiny(3, layers=2), token_ids(2, 120)
    config = rj.DecodeConfig(method, **FIELDS | {"budget_tokens": 48})
    extend = jax.jit(rj.extend, static_argnames=("model", "config"))
    state, _ = force(model, config, begin(model, config, tokens, LENGTHS, 120)[0], tokens, 20)
    evicted = ~np.asarray(state.layers[1].kept.alive)
    assert evicted[1].any()

    def next_turn(state):
        turn, lengths = jnp.asarray(tokens[:, 50:70]), jnp.array([5, 20])
        state, logits = extend(model.params, model.config, config, state, turn, lengths)
        _, decoded = step(model.params, model.config, config, state, jnp.array([1, 2]))
        return logits, decoded

    def without_evicted(layer):
        gone = evicted[..., None, None, None]
        return layer.replace(pages=jnp.where(gone, jnp.nan, layer.pages))

    poisoned = state.replace(layers=(state.layers[0], without_evicted(state.layers[1])))
    for clean, other in zip(next_turn(state), next_turn(poisoned), strict=True):
        assert np.isfinite(clean).all()
        np.testing.assert_array_equal(clean, other)
