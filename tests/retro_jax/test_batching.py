"""`generate_many`: sequences come and go, and none notices another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import batching
from retro_jax.sampling import sequence_keys
from retro_jax.slots import insert
from retro_jax.state import reset
from tests.retro_jax.test_texts import Letters
from tests.retro_jax.tiny import ATOL, CENTROIDS, VOCAB, assert_same_tokens, tiny

MODEL = rj.Model(tiny(3, layers=2).config, tiny(3, layers=2).params, Letters())
PAGES = {"page_size": 8, "budget_tokens": 24, "dense_layers": 1, "prefill_chunk": 16}
CONFIGS = {
    "retro": rj.DecodeConfig("retro", window=3, **PAGES),
    "snapkv": rj.DecodeConfig("snapkv", observation=6, **PAGES),
}
STATES = {
    "of what revises": rj.DecodeConfig("retro", window=3, rectify_every=5, **PAGES | CENTROIDS),
    "of what evicts": CONFIGS["snapkv"],
}
"""Configurations whose states have between them all that a state can have."""
SLOTS, CAPACITY, STOP = 2, 128, "A"
DRAWN = rj.Sampling(temperature=0.8, top_k=40, seed=4)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, VOCAB, length) for length in (3, 41, 17, 1, 29, 16, 8)]
LIMITS = (19, 4, 30, 9, 1, 25, 12)
REQUESTS = [rj.Request(prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]

PROGRAMS = batching._read, batching._insert, batching._decode
settings = dict(slots=SLOTS, capacity=CAPACITY, steps_per_call=4, stop_tokens=[7], stop=[STOP])
many = functools.partial(rj.generate_many, MODEL, **settings)


@functools.cache
def replies():
    """Of all requests, drawn by retro, in the order in which they were finished."""
    return tuple(many(REQUESTS, CONFIGS["retro"], 5, sampling=DRAWN))


def in_order(found):
    return sorted(found, key=lambda reply: reply.index)


def on_two_devices():
    mesh = rj.make_mesh(2, 1)
    sharded = dataclasses.replace(MODEL, params=rj.shard_params(MODEL.params, MODEL.config, mesh))
    with pytest.raises(ValueError, match="slots 3 do not divide over 2 devices"):
        rj.generate_many(sharded, REQUESTS, CONFIGS["snapkv"], 5, **settings | {"slots": 3})
    before = [program._cache_size() for program in PROGRAMS]
    found = tuple(rj.generate_many(sharded, REQUESTS, CONFIGS["snapkv"], 5, **settings))
    assert [program._cache_size() - old for program, old in zip(PROGRAMS, before, strict=True)] == [1, 1, 1]
    begun = [np.concatenate([np.tile(PROMPTS[1], 2), PROMPTS[index]]) for index in (0, 2)]
    alike = in_order(rj.generate_many(sharded, begun, CONFIGS["snapkv"], 5, **settings))
    single = [next(rj.generate_many(sharded, [each], CONFIGS["snapkv"], 5, **settings)) for each in begun]
    assert [reply.tokens for reply in alike] == [reply.tokens for reply in single]
    assert [program._cache_size() - old for program, old in zip(PROGRAMS, before, strict=True)] == [1, 1, 1]
    return found


@pytest.mark.parametrize(
    ("name", "sampling", "run"),
    (("retro", DRAWN, replies), ("snapkv", None, on_two_devices)),
    ids=("retro, drawn", "snapkv under a mesh"),
)
def test_replies_are_those_of_generate(name, sampling, run):
    keys, found = sequence_keys(DRAWN, len(PROMPTS)), run()
    by_index = in_order(found)
    assert [reply.index for reply in by_index] == list(range(len(PROMPTS)))
    assert [reply.index for reply in found] != list(range(len(PROMPTS)))
    for begin in range(0, len(PROMPTS), SLOTS):
        some = slice(begin, begin + SLOTS)
        whole = rj.generate(
            MODEL,
            PROMPTS[some],
            CONFIGS[name],
            max(LIMITS[some]),
            sampling=sampling,
            keys=keys[some],
            stop_tokens=[],
            capacity=CAPACITY,
            steps_per_call=4,
        )
        for reply, tokens, logprobs in zip(by_index[some], whole.tokens, whole.logprobs, strict=True):
            limit, prompt = LIMITS[reply.index], PROMPTS[reply.index]
            ends = [place + 1 for place, token in enumerate(tokens) if token in (7, ord(STOP) - 32)]
            end = min([*ends, limit])
            assert_same_tokens(
                MODEL, CONFIGS[name], prompt, reply.tokens, tokens[:end], sampling, keys[reply.index]
            )
            assert reply.finished == (end in ends) and reply.prompt_tokens == len(prompt)
            assert reply.text == MODEL.tokenizer.decode(tokens[: end - reply.finished])
            np.testing.assert_allclose(reply.logprobs, logprobs[:end], atol=10 * ATOL)
            assert (reply.metrics.kv_bytes > 0).sum() == end - 1 if end > 1 else reply.metrics is None
    assert any(reply.finished for reply in by_index) and not all(reply.finished for reply in by_index)


def test_a_reply_depends_on_no_other():
    """Keys follow prompts, not slots; what a slot held before is gone."""
    keys = sequence_keys(DRAWN, len(PROMPTS))
    asked = [
        rj.Request(request.prompt, request.max_new_tokens, key)
        for request, key in zip(REQUESTS, keys, strict=True)
    ]
    expected = in_order(replies())
    config, compiled = CONFIGS["retro"], [program._cache_size() for program in PROGRAMS]
    backwards = in_order(many(iter(asked[::-1]), config, 5, sampling=DRAWN))
    for reply, other in zip(backwards[::-1], expected, strict=True):
        assert (reply.tokens, reply.text) == (other.tokens, other.text)
    alone = list(many(asked[2:3], config, 5, sampling=DRAWN))
    assert alone[0].tokens == expected[2].tokens
    assert [program._cache_size() for program in PROGRAMS] == compiled


def test_what_prompts_begin_with_is_read_once(monkeypatch):
    head, other = (np.random.default_rng(seed).integers(0, VOCAB, 70) for seed in (1, 2))
    alike = [np.concatenate([head, end]) for end in ([3], PROMPTS[2], [5, 6])]
    prompts = [*alike, PROMPTS[0], other, other]
    keys, config, read = sequence_keys(DRAWN, len(prompts)), CONFIGS["retro"], []
    requests = [rj.Request(prompt, 7, key) for prompt, key in zip(prompts, keys, strict=True)]

    def spied(*arguments):
        read.append(int(arguments[5].sum()))
        return program(*arguments)

    program = batching._read
    replies()
    compiled = [each._cache_size() for each in PROGRAMS]
    monkeypatch.setattr(batching, "_read", spied)
    found = in_order(many(requests, config, 5, sampling=DRAWN))
    assert read == [16, 16, 16, 16, 6, 1, 16, 1, 2, 3, 16, 16, 16, 16, 5, 1, 1]
    for reply, request in zip(found, requests, strict=True):
        (alone,) = many([request], config, 5, sampling=DRAWN)
        assert reply.tokens == alone.tokens and reply.prompt_tokens == alone.prompt_tokens
        np.testing.assert_allclose(reply.logprobs, alone.logprobs, atol=10 * ATOL)
    read.clear()
    list(many(iter(requests[:2]), config, 5, sampling=DRAWN))
    assert sum(read) == sum(map(len, prompts[:2]))  # an iterator does not tell what comes
    assert [each._cache_size() for each in PROGRAMS] == compiled


@pytest.mark.parametrize("bad", ([], [VOCAB], [1] * CAPACITY, "error"))
def test_what_an_iterator_cannot_give_comes_after_the_replies(bad):
    def prompts():
        yield from REQUESTS[:4]
        if bad == "error":
            raise OSError("the file is gone")
        yield bad
        raise AssertionError("no further prompt is asked for")

    found, match = [], "the file is gone" if bad == "error" else "prompt 4 "
    with pytest.raises(OSError if bad == "error" else ValueError, match=match):
        found.extend(many(prompts(), CONFIGS["retro"], 5, sampling=DRAWN))
    expected = in_order(replies())[:4]
    assert [reply.tokens for reply in in_order(found)] == [reply.tokens for reply in expected]


@pytest.mark.parametrize("at", ("prompt", "reply"))
def test_logits_that_are_not_finite_end_their_reply_alone(at):
    bad, other = (in_order(replies())[index] for index in (2, 1))
    elsewhere = {*PROMPTS[1], *other.tokens, *(PROMPTS[2] if at == "reply" else ())}
    token = next(token for token in (bad.tokens if at == "reply" else PROMPTS[2]) if token not in elsewhere)
    embed = MODEL.params.embed.at[token].set(jnp.nan)
    broken = dataclasses.replace(MODEL, params=MODEL.params.replace(embed=embed))
    keys, found = sequence_keys(DRAWN, len(PROMPTS)), []
    requests = [rj.Request(PROMPTS[index], LIMITS[index], keys[index]) for index in (1, 2)]
    with pytest.raises(rj.NonFiniteLogits, match="prompt 1 ") as error:
        found.extend(rj.generate_many(broken, requests, CONFIGS["retro"], 5, sampling=DRAWN, **settings))
    assert [reply.tokens for reply in found] == [other.tokens]
    end = bad.tokens.index(token) + 1 if at == "reply" else 0
    assert error.value.partial.tokens == bad.tokens[:end] and len(error.value.partial.logprobs) == end


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    (
        ({"prompts": "a text"}, TypeError, "put a single prompt in brackets"),
        ({"prompts": []}, ValueError, "prompts are empty"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 is empty"),
        ({"prompts": [[1], np.array(2)]}, ValueError, r"prompt 1 has shape \(\)"),
        ({"prompts": [[1], np.array([0.5])]}, TypeError, "prompt 1 has dtype float"),
        (
            {"prompts": [[1], rj.Request([1], 0)]},
            ValueError,
            "prompt 1: max_new_tokens 0 must be at least 1",
        ),
        (
            {"prompts": [[1], rj.Request([1], 128)]},
            ValueError,
            "prompt 1 .* 129 positions, the cache holds 128",
        ),
        (
            {"prompts": [[1], rj.Request([1], 900)]},
            ValueError,
            "prompt 1 .* 901 positions, tiny-group-3 has 256",
        ),
        ({"prompts": [rj.Request([1], key=5)]}, TypeError, "key of prompt 0 is not one typed key"),
        (
            {"prompts": [rj.Request([1], key=jax.random.key(0, impl="rbg"))]},
            ValueError,
            "key of prompt 0 is of kind rbg.*impl='threefry2x32'",
        ),
        ({"prompts": iter([[1]]), "capacity": None}, ValueError, "give capacity, or the prompts as a list"),
        ({"capacity": 300}, ValueError, r"capacity 300 is not within 1\.\.256"),
        ({"slots": 0}, ValueError, "slots 0 must be at least 1"),
        ({"steps_per_call": 0}, ValueError, "steps_per_call 0 must be at least 1"),
        ({"slots": 2.5}, TypeError, r"slots is 2\.5; give a whole number"),
        ({"capacity": 64.0}, TypeError, r"capacity is 64\.0; give a whole number"),
        ({"prompts": [rj.Request([1], True)]}, TypeError, "prompt 0: max_new_tokens is True"),
        ({"prompts": [[1], [2**64]]}, ValueError, "prompt 1 has token id 18446744073709551616, outside"),
        ({"prompts": [[2**63, -1]]}, ValueError, "prompt 0 has token id 9223372036854775808, outside"),
        ({"prompts": [[1, [2, 3]]]}, ValueError, "prompt 0 holds rows of different lengths"),
        ({"stop": [""]}, ValueError, "at least one character"),
        ({"stop_tokens": [VOCAB]}, ValueError, "stop token 96 lies outside"),
        ({"stop_tokens": [7.5]}, TypeError, r"stop token 7\.5 is not a whole number"),
    ),
)
def test_what_cannot_be_is_refused_at_the_door(changes, error, match, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without the checks of tests
    with pytest.raises(error, match=match):
        many(**{"prompts": [[1]], "config": CONFIGS["snapkv"], "max_new_tokens": 4} | changes)


def random_state(config, rows, seed):
    """A state of random numbers; pages of NaN."""
    state, rng = rj.init_state(MODEL.config, config, rows, CAPACITY), np.random.default_rng(seed)
    state = jax.tree.map(lambda array: jnp.asarray(rng.random(array.shape) * 100).astype(array.dtype), state)
    nan = (layer.replace(pages=jnp.full_like(layer.pages, jnp.nan)) for layer in state.layers)
    return state.replace(layers=tuple(nan))


@pytest.mark.parametrize("name", STATES)
def test_a_reset_sequence_is_as_a_new_one_and_others_stay(name):
    before = random_state(STATES[name], 3, 1)
    after = reset(MODEL.config, STATES[name], before, jnp.array([False, True, False]))
    fresh = rj.init_state(MODEL.config, STATES[name], 3, CAPACITY)
    pages = {id(layer.pages) for layer in fresh.layers}
    for old, new, empty in zip(*map(jax.tree.leaves, (before, after, fresh)), strict=True):
        np.testing.assert_array_equal(new[0::2], old[0::2])
        np.testing.assert_array_equal(new[1], old[1] if id(empty) in pages else empty[1])


@pytest.mark.parametrize("name", STATES)
def test_no_array_of_a_new_state_has_a_type_that_programs_do_not_return(name):
    """A program would be compiled once for a new state, and again for what it returned."""
    state = rj.init_state(MODEL.config, STATES[name], 2, CAPACITY)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", STATES)
def test_a_newcomer_takes_all_of_its_slot(name):
    slots, newcomers = random_state(STATES[name], 4, 1), random_state(STATES[name], 3, 2)
    after = insert(slots, newcomers, jnp.array([2, 4, 0]))
    for old, new, got in zip(*map(jax.tree.leaves, (slots, newcomers, after)), strict=True):
        np.testing.assert_array_equal(got, jnp.stack([new[2], old[1], new[0], old[3]]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_is_read_as_into_a_new_state_whatever_was_there(name):
    """Also where what was there is not finite."""
    config, found = CONFIGS[name], []
    sampling = DRAWN if name == "retro" else rj.Sampling()
    inputs = PROMPTS[5][None].astype(np.int32), np.array([16], np.int32), np.ones(1, bool)
    for state in (rj.init_state(MODEL.config, config, 1, CAPACITY), random_state(config, 1, 3)):
        after, first = batching._read(
            MODEL.params, MODEL.config, config, state, *inputs, sampling, sequence_keys(DRAWN, 1)
        )
        layers = (layer.replace(pages=layer.pages[:, :, :2]) for layer in after.layers)
        found.append((after.replace(layers=tuple(layers)), first))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_newcomer_is_put_in_place_without_a_copy_of_the_cache(name, dtype):
    model = dataclasses.replace(MODEL.config, max_positions=2**16, dtype=dtype)
    slots, newcomers = (
        jax.eval_shape(lambda rows=rows: rj.init_state(model, STATES[name], rows, 2**16)) for rows in (4, 2)
    )
    compiled = jax.jit(insert, donate_argnums=0).lower(slots, newcomers, jnp.zeros(2, jnp.int32)).compile()
    pages = slots.layers[0].pages
    assert compiled.memory_analysis().temp_size_in_bytes < pages.size * pages.dtype.itemsize / 100
