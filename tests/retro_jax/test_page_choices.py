"""Which pages each method chooses, against NumPy in float64 on the first sparse layer of a random model.

Below that layer everything is dense, so its queries and keys are known without decoding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import Statistics
from retro_jax.budget import rules_of
from retro_jax.cache import LayerState
from retro_jax.rules import Query
from retro_jax.selection import fewest as fewest_pages
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


def fewest(shares, chosen, newest, p):
    """Of the chosen pages the fewest that reach p, the first and the newest among them; and what those reach.

    Also what they reach without the last of them.
    """
    ranked = sorted(chosen, key=lambda page: (page not in (0, newest), -shares[page], page))
    for count in range(len({0, newest}), len(ranked) + 1):
        reached = shares[ranked[:count]].sum()
        if reached >= p:
            break
    return set(ranked[:count]), reached, shares[ranked[: count - 1]].sum()


@pytest.mark.parametrize(
    "fields",
    (
        {"method": "quest"},
        {"method": "retro", "window": 3, "score": "mean_key", "group_reduce": "mass"},
        {"method": "quest", "score": "oracle"},
    ),
    ids=("bounds", "mean_key", "oracle"),
)
def test_top_p_loads_the_fewest_of_the_best_pages_that_reach_the_share(fields):
    p, budget = 0.6, 7
    config = rj.DecodeConfig(**FIELDS | fields | {"budget_tokens": budget * SIZE, "budget_top_p": p})
    chosen, q, k, _ = decode(config)
    counts = []
    for row, head, queries, keys in each_head(q, k):
        for number in range(STEPS):
            position = LENGTHS[row] + number
            newest = position // SIZE
            before = set(range(newest))
            if config.score == "oracle":  # its scores are shares, of the newest page also
                by_head = np.array(
                    [page_mass(one[None], keys, position, begun(position)) for one in queries[position]]
                )
                shares = page_mass(queries[position], keys, position, before)
            else:
                by_head = np.array(
                    [page_scores(one, keys, position, config.score) for one in queries[position]]
                )
                weights = np.where(np.arange(PAGES) < newest, np.exp(by_head / np.sqrt(queries.shape[-1])), 0)
                weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
                shares = weights.mean(axis=0)
                by_head = weights if config.group_reduce == "mass" else by_head
            within = best(np.mean(by_head, axis=0), begun(position), budget, newest)
            expected, reached, missed = fewest(shares, within, newest, p)
            got = chosen[row][number][head]
            rounds = min(abs(reached - p), abs(missed - p)) < ATOL
            assert rounds or got == expected
            counts.append(len(got))
    assert min(counts) < budget - 2 and max(counts) > min(counts) + 2  # ragged, and fewer than the budget


def test_top_p_takes_pages_in_any_order_with_anything_behind_them():
    """As kernels select them."""
    config, rng = rj.DecodeConfig("quest", **FIELDS | {"budget_tokens": 56}), np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(1, 2, PAGES, 2, 16)), jnp.float32)
    cache = LayerState(jnp.zeros((1, 2, PAGES, 2, SIZE, 16)), Statistics(values, None, "min_max"))
    q = jnp.asarray(rng.normal(size=(1, 6, 16)), jnp.float32)
    query = Query(q, jnp.array([80]), jnp.array([7]), 1, q)
    rules = rules_of(config, PAGES, 16, 4)
    ids, counts = config.attention.select(rules, cache, query, None)
    mixed = np.concatenate([rng.permuted(np.asarray(ids)[..., :7], axis=2), np.full((1, 2, 3), -5)], axis=2)

    def chosen(ids):
        ids, counts_left = fewest_pages(rules, cache, query, jnp.asarray(ids), counts, 0.6)
        return [set(row[:count]) for row, count in zip(ids[0].tolist(), counts_left[0].tolist(), strict=True)]

    assert chosen(mixed) == chosen(ids)
    assert all(
        {0, 10} <= pages < set(before) for pages, before in zip(chosen(ids), ids[0].tolist(), strict=True)
    )


def page_scores(query, keys, position, score):
    """A query's scores[P] of all pages that have begun, -inf for others."""
    kind = {"bounds": "min_max", "mean_key": "mean_key"}[score]
    scores = np.full(PAGES, -np.inf)
    for page in begun(position):
        vectors = oracle.statistics(keys[page * SIZE : min((page + 1) * SIZE, position + 1)], kind)
        scores[page] = oracle.page_score(query, vectors, score)
    return scores


@pytest.mark.parametrize(("every", "window"), ((4, 1), (24, 3)))
def test_steps_between_selections_load_what_an_earlier_token_has_selected(every, window):
    config = rj.DecodeConfig("retro", window=window, select_every=every, **FIELDS | {"budget_tokens": 40})
    chosen, q, k, _ = decode(config)
    differs = 0
    for row, head, queries, keys in each_head(q, k):
        loaded = None
        for number in range(STEPS):
            position = LENGTHS[row] + number
            newest = position // SIZE
            scores = np.mean(
                [page_scores(one, keys, position, "bounds") for one in queries[position]], axis=0
            )
            if loaded is None or position % every == 0:
                loaded = best(scores, begun(position), 5, newest)
                loaded = same(chosen[row][number][head], loaded, scores, newest)
                continue
            # What has been loaded stays but for the earliest pages, which make room for those that begin.
            late = sorted(loaded | {newest}, reverse=True)
            loaded = best(np.arange(PAGES), set(late), 5, newest)
            assert chosen[row][number][head] == loaded
            differs += loaded != best(scores, begun(position), 5, newest)
    assert differs > 20


def test_layers_above_an_anchor_load_its_pages_and_keep_no_statistics():
    model, tokens = tiny(3, layers=5), token_ids(2, 120)
    config = rj.DecodeConfig("quest", anchor_every=2, **FIELDS)
    state, _ = force(model, config, begin(model, config, tokens, LENGTHS, 120)[0], tokens, 2)
    layers = state.layers[1:]
    for anchor, above in ((0, 1), (2, 3)):
        np.testing.assert_array_equal(layers[anchor].last_loaded, layers[above].last_loaded)
    assert (layers[0].last_loaded != layers[2].last_loaded).any()
    assert [layer.statistics is not None for layer in layers] == [True, False, True, False]


@pytest.mark.parametrize(
    "fields",
    (
        {"method": "quest", "budget_top_p": 0.6, "budget_tokens": 56},
        {"method": "retro", "window": 1, "select_every": 4, "budget_tokens": 40},
    ),
    ids=("top_p", "select_every"),
)
def test_bytes_are_those_of_the_pages_that_are_loaded_and_of_the_statistics_that_are_read(fields):
    model, tokens = tiny(3, layers=2), token_ids(2, 120)
    config, metrics, begins = rj.DecodeConfig(**FIELDS | fields), [], np.array([8, 72])
    state, _ = begin(model, config, tokens, begins, 120)
    force(model, config, state, tokens, 8, lambda state: metrics.append(state.metrics))
    context = begins + np.arange(1, 9)[:, None]
    pages, begun_pages = np.stack([one.pages_loaded for one in metrics]), -(-context // SIZE)
    if config.budget_top_p:
        scored = begun_pages
        assert (pages[:, 1] < 6).any()
    else:
        scored = np.where((context - 1) % 4 == 0, begun_pages, 0)
        np.testing.assert_array_equal(pages, np.minimum(5, begun_pages))
    vectors = 2 * context + 2 * SIZE * pages + 2 * scored
    kv_bytes = [one.kv_bytes for one in metrics]
    np.testing.assert_allclose(kv_bytes, vectors * 2 * 16 * 4, rtol=1e-6)  # KV heads, channels, float32
