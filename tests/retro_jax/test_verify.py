"""Verified decoding gives full attention's tokens and leaves full attention's cache."""

import functools
import importlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import retro_jax as rj
from retro_jax import models
from retro_jax.drafts import RoundMetrics
from retro_jax.sampling import sample, sequence_keys
from tests.retro_jax.test_texts import Letters
from tests.retro_jax.tiny import ATOL, CENTROIDS, VOCAB, begin, tiny, token_ids

DRAFTS = {
    "quest": rj.DecodeConfig("quest", page_size=8, budget_tokens=16, dense_layers=0),
    "retro": rj.DecodeConfig("retro", window=3, page_size=8, budget_tokens=16, dense_layers=1),
    "taken over": rj.DecodeConfig(
        "quest", page_size=8, budget_tokens=16, dense_layers=0, anchor_every=2, select_every=4
    ),
    "centroids": rj.DecodeConfig(
        "retro", window=3, page_size=8, budget_tokens=16, dense_layers=0, **CENTROIDS
    ),
}
SAMPLING = rj.Sampling(temperature=0.8, top_k=30, top_p=0.95, seed=5)
MODEL = tiny(3, layers=2)
LENGTHS, CAPACITY, K, ROUNDS = (2, 13, 37, 52), 128, 3, 12
TOKENS = token_ids(4, CAPACITY)
PROMPTS = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]
KEYS = sequence_keys(SAMPLING, 4)

decode = jax.jit(rj.verified_decode, static_argnames=("model", "config", "rounds", "k", "sampling", "adapt"))
draw = jax.jit(sample, static_argnames="sampling")
step = jax.jit(rj.verified_step, static_argnames=("model", "config", "k", "sampling"))


@functools.cache
def prompted(name, lengths=LENGTHS):
    """The state after prompts of these lengths, and each one's next token."""
    state, logits = begin(MODEL, DRAFTS[name], TOKENS, lengths, CAPACITY)
    return state, jnp.argmax(logits, axis=-1)


def always_k(name, state, firsts, sampling=None, remaining=(1000,) * 4):
    """Rounds of always K drafts."""
    arguments = MODEL.params, MODEL.config, DRAFTS[name], state, firsts, ROUNDS, K, sampling, KEYS
    return decode(*arguments, remaining=jnp.array(remaining), adapt=False)


@functools.cache
def verified(name, sampling=None):
    """The state after the prompts, and state, result and texts of rounds behind them."""
    before, firsts = prompted(name)
    after, out = always_k(name, before, firsts, sampling)
    texts = [[*row, int(first)] for row, first in zip(PROMPTS, firsts, strict=True)]
    return before, after, out, joined(texts, out)


def joined(texts, out):
    """Texts with the tokens that were emitted behind them."""
    rows = zip(texts, np.asarray(out.tokens), np.asarray(out.emitted), strict=True)
    return [[*text, *row[emitted].tolist()] for text, row, emitted in rows]


def assert_full_attentions(texts, begins, sampling=None, model=MODEL):
    """That full attention chooses each text's tokens from position `begins` on; ties within rounding pass.

    By dense attention over the whole text, without any cache.
    """
    padded = np.array([text + [0] * (CAPACITY + 1 - len(text)) for text in texts], np.int32)
    logits = models.forward(model.params, model.config, padded)[:, :-1]
    if sampling is None:
        scores = np.take_along_axis(np.asarray(logits), padded[:, 1:, None], axis=2)[..., 0]
        right = jnp.max(logits, axis=-1) - scores <= 2 * ATOL
    else:
        positions = jnp.tile(jnp.arange(1, CAPACITY + 1), 4)
        drawn = draw(logits.reshape(-1, VOCAB), sampling, jnp.repeat(KEYS, CAPACITY), positions)
        right = drawn.reshape(4, -1) == padded[:, 1:]
    for row, (text, begin_at) in enumerate(zip(texts, begins, strict=True)):
        assert right[row, begin_at - 1 : len(text) - 1].all(), row


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_tokens_are_full_attentions(name):
    _, _, out, texts = verified(name)
    assert_full_attentions(texts, LENGTHS)
    accepted, drafted = np.asarray(out.metrics.accepted), np.asarray(out.metrics.drafted)
    assert (drafted == K).all()
    assert len(np.unique(accepted)) > 2 and (accepted.max(axis=1) > accepted.min(axis=1)).any()  # ragged
    np.testing.assert_array_equal(out.metrics.emitted, accepted + 1)


def test_sampled_tokens_are_those_that_full_attention_draws():
    """With the same keys, token for token: what is equal needs no test of distributions."""
    _, _, out, texts = verified("quest", SAMPLING)
    assert texts != verified("quest")[-1]
    assert_full_attentions(texts, np.array(LENGTHS) + 1, SAMPLING)
    accepted = np.asarray(out.metrics.accepted)
    assert 0 < accepted.sum() < accepted.size * K


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_leave_no_trace(name):
    """The state is that of the same tokens without any draft, by a prompt's dense pass."""
    config = DRAFTS[name]
    before, after, out, texts = verified(name)
    lengths = np.array([len(text) - 1 for text in texts])  # the newest is pending
    padded = np.array([text + [0] * (CAPACITY - len(text)) for text in texts], np.int32)
    exact, _ = begin(MODEL, config, padded, lengths, CAPACITY)
    np.testing.assert_array_equal(after.length, lengths)
    np.testing.assert_array_equal(out.pending, [text[-1] for text in texts])

    # Everything but pages, statistics and length is untouched.
    for part in ("budget", "decoded", "hidden", "metrics"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    for found, wanted, old in zip(after.layers, exact.layers, before.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.outputs, old.outputs)
        jax.tree.map(np.testing.assert_array_equal, found.last_loaded, old.last_loaded)
        for row, length in enumerate(lengths):
            pages = -(-length // 8)
            np.testing.assert_allclose(
                _tokens(found.pages, row)[:length], _tokens(wanted.pages, row)[:length], atol=ATOL
            )
            for one, other in zip(*map(jax.tree.leaves, (found.statistics, wanted.statistics)), strict=True):
                rounding = 1 if one.dtype == jnp.int8 else ATOL  # of a number that lies between two
                difference = one[row, :, :pages].astype(jnp.float32) - other[row, :, :pages]
                assert np.abs(difference).max() <= rounding
            if found.block_values is not None:
                blocks = length // (config.residual_pages * 8)
                np.testing.assert_allclose(
                    found.block_values[row, :, :blocks], wanted.block_values[row, :, :blocks], atol=ATOL
                )


def _tokens(pages, row):
    """Keys and values [T, K, 2, D] of one sequence."""
    K, P, _, S, D = pages.shape[1:]
    return np.asarray(pages[row]).transpose(1, 3, 0, 2, 4).reshape(P * S, K, 2, D)


def test_a_step_drafts_as_told_and_leaves_the_others_alone():
    state, newest = prompted("quest")
    active, drafts = jnp.array([True, False, True, True]), jnp.array([0, 3, 2, 0])
    arguments = MODEL.params, MODEL.config, DRAFTS["quest"], state, newest, K
    after, out = step(*arguments, drafts, active=active)
    emitted = np.asarray(out.metrics.emitted)
    for row, text in enumerate(verified("quest")[-1]):
        new = text[LENGTHS[row] + 1 :][: emitted[row]]
        assert np.asarray(out.tokens[row, : emitted[row]]).tolist() == new
    np.testing.assert_array_equal(out.metrics.drafted, [0, 0, 2, 0])
    np.testing.assert_array_equal(emitted[[0, 1, 3]], [1, 0, 1])
    np.testing.assert_array_equal(out.metrics.draft_bytes > 0, [False, False, True, False])
    token = 2 * MODEL.config.num_layers * 2 * 16 * 4  # keys and values, layers, KV heads, channels, bytes
    np.testing.assert_array_equal(out.metrics.check_bytes, token * np.array([3, 0, 40, 53]))
    np.testing.assert_array_equal(after.length, state.length + emitted)
    assert out.pending[1] == newest[1] and not out.emitted[1].any()
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[1], old[1])


def test_drafts_shrink_where_room_or_the_tokens_asked_for_end():
    lengths = 2, CAPACITY - 10, CAPACITY - 2, CAPACITY - 1
    state, firsts = prompted("quest", lengths)
    after, out = always_k("quest", state, firsts, remaining=(5, 1000, 1000, 1))
    texts = [[*row[:length], int(first)] for row, length, first in zip(TOKENS, lengths, firsts, strict=True)]
    assert_full_attentions(joined(texts, out), lengths)
    np.testing.assert_array_equal(jnp.sum(out.emitted, axis=1), [5, 10, 2, 1])
    np.testing.assert_array_equal(after.length, [7, CAPACITY, CAPACITY, CAPACITY])
    np.testing.assert_array_equal(out.remaining, 0)


def generate(prompts, new_tokens, model=MODEL, previous=None, stop_tokens=(VOCAB - 1,), **options):
    """`rj.generate`, a round a call; one program for all tests."""
    return rj.generate(
        model,
        prompts,
        DRAFTS["quest"],
        new_tokens,
        previous=previous,
        stop_tokens=stop_tokens,
        capacity=None if previous else CAPACITY,
        steps_per_call=K + 1,
        verify=K,
        **options,
    )


def test_generation_stops_within_drafts_and_goes_on():
    """Three turns, the last without a prompt."""
    module = importlib.import_module("retro_jax.generate")  # the package exports a function of this name
    programs = module._verified_decode._cache_size()
    stop = verified("quest")[-1][0][LENGTHS[0] + 7]
    texts, previous = [[] for _ in PROMPTS], None
    turn = [list(range(33)), [1, 5], [9, 2, 6], [3]]
    for prompts, new_tokens in ((PROMPTS, 20), (turn, 9), (None, 6)):
        result = generate(prompts, new_tokens, previous=previous, stop_tokens=[stop])
        texts = [[*text, *(prompts[row] if prompts else ())] for row, text in enumerate(texts)]
        begins = [len(text) for text in texts]
        for row, (text, tokens) in enumerate(zip(texts, result.tokens, strict=True)):
            text += tokens
            ended = stop in tokens or (prompts is None and previous.finished[row])
            assert result.finished[row] == ended and stop not in tokens[:-1]
            assert ended or len(tokens) == new_tokens
        assert_full_attentions(texts, begins)
        assert result.exact
        np.testing.assert_array_equal(result.pending, [text[-1] for text in texts])
        previous = result
    np.testing.assert_array_equal(result.state.length[:4], [len(text) - 1 for text in texts])
    assert module._verified_decode._cache_size() - programs == 1
    metrics = result.metrics
    assert metrics.emitted.sum() == sum(map(len, result.tokens))


def test_a_generation_ends_within_a_draft_where_a_stop_string_is_whole():
    model = rj.Model(MODEL.config, MODEL.params, Letters())
    whole, streamed = generate(PROMPTS, 24, model), [""] * 4
    # Three letters, of which the last but one of the tokens of a round is the last.
    text, emitted = whole.texts[3], whole.metrics.emitted[:, 3]
    ends = np.cumsum(emitted)[emitted > 1]
    string = next(text[end - 3 : end] for end in ends if text.find(text[end - 3 : end]) == end - 3)
    ends = [text.find(string) + 3 if string in text else 24 for text in whole.texts]

    def stream(index, piece):
        streamed[index] += piece

    result = generate(PROMPTS, 24, model, stop=[string], stream=stream)
    assert result.tokens == [tokens[:end] for tokens, end in zip(whole.tokens, ends, strict=True)]
    assert result.finished == [string in text for text in whole.texts]
    assert result.texts[3] == text[: ends[3] - 3] and result.texts == streamed
    assert result.metrics.emitted[:, 3].sum() > ends[3] - 1  # the round went past it
    np.testing.assert_array_equal(result.state.length[:4], np.array(LENGTHS) + ends - 1)
    # A next turn finds the state as it was there.
    after = generate(["abc"] * 4, 6, model, previous=result)
    rows = zip(PROMPTS, result.tokens, after.tokens, strict=True)
    texts = [[*prompt, *tokens, *Letters().encode("abc"), *more] for prompt, tokens, more in rows]
    assert_full_attentions(texts, [len(text) - 6 for text in texts])


def test_a_model_on_a_mesh_verifies_there():
    model = tiny(3, layers=1)
    params = rj.shard_params(model.params, model.config, rj.make_mesh(2, 2))
    result = generate(PROMPTS, 12, rj.Model(model.config, params, None))
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, result.tokens, strict=True)]
    assert_full_attentions(texts, LENGTHS, model=model)
    assert result.metrics.accepted.sum() > 0
    pages = result.state.layers[-1].pages
    assert pages.sharding.shard_shape(pages.shape)[:2] == (2, 1)


def test_logits_that_are_not_finite_end_it():
    whole = verified("quest")[-1]
    prompted = {token for prompt in PROMPTS for token in prompt}
    token = next(token for token in whole[1][LENGTHS[1] + 2 :] if token not in prompted)
    embed = MODEL.params.embed.at[token].set(jnp.nan)
    broken = rj.Model(MODEL.config, MODEL.params.replace(embed=embed), None)
    with pytest.raises(rj.NonFiniteLogits, match=r"the logits of sequence . are not finite after") as error:
        generate(PROMPTS, 20, broken)
    for row, found in enumerate(error.value.partial.tokens):
        assert found == whole[row][LENGTHS[row] :][: len(found)]
        assert token not in found[:-1] and len(found) < 20


@pytest.mark.parametrize(
    ("accepted", "tried", "step_bytes", "check_bytes", "weights", "drafts"),
    (
        (0.0, 0.0, 0.0, 0.0, 10, 8),  # nothing is known yet
        (90.0, 90.0, 1.0, 100.0, 0, 8),  # steps that cost next to nothing
        (90.0, 90.0, 100.0, 100.0, 0, 1),  # that cost what a check does
        (0.0, 90.0, 1.0, 100.0, 0, 1),  # that are never accepted
        (50.0, 100.0, 10.0, 100.0, 0, 2),  # 1.78 tokens for 120 bytes; 1.51 for 110, 1.91 for 130
        (90.0, 100.0, 3.0, 19.0, 1, 6),  # 5.14 tokens for 44; 4.62 for 40, 5.60 for 48
    ),
)
def test_drafts_are_as_many_as_pay(accepted, tried, step_bytes, check_bytes, weights, drafts):
    # Beside a sequence that has ended, which would ask for others.
    other = 9.0 if accepted == 0.0 else 0.0
    pairs = ((accepted, other), (tried, 9.0), (step_bytes, 5.0), (check_bytes, 5.0))
    known = rj.Acceptance(*(jnp.array(pair) for pair in pairs))
    assert known.best_drafts(8, jnp.array([True, False]), [weights] * 9) == drafts


def test_what_is_known_of_acceptance_fades():
    def metrics(drafted, accepted):
        values = drafted, accepted, accepted + 1, 6.0 * drafted, 30.0 * drafted
        return RoundMetrics(*(jnp.array([value, 0 * value]) for value in values))

    known = rj.Acceptance.unknown(2).after(metrics(4, 2)).after(metrics(2, 2))
    np.testing.assert_allclose(known.accepted, [0.9 * 2 + 2, 0])
    np.testing.assert_allclose(known.tried, [0.9 * 3 + 2, 0])  # the first that was wrong is tried too
    np.testing.assert_allclose(known.step_bytes, [6, 0])
    np.testing.assert_allclose(known.check_bytes, [60, 0])


def test_metrics_tell_acceptance_by_position():
    rounds = rj.VerifiedMetrics(
        drafted=np.array([[3, 1], [2, 0]]),
        accepted=np.array([[1, 1], [2, 0]]),
        emitted=np.array([[2, 2], [3, 0]]),
        draft_bytes=np.array([[30.0, 10.0], [20.0, 0.0]]),
        check_bytes=np.array([[100.0, 80.0], [120.0, 0.0]]),
    )
    summary = rounds.summary()
    assert summary["acceptance"] == [1.0, 0.5, 0.0]
    assert (summary["checks"], summary["drafts_per_check"], summary["tokens_per_check"]) == (3, 2.0, 7 / 3)
    assert (summary["draft_bytes_per_check"], summary["check_bytes_per_check"]) == (20.0, 100.0)
    assert summary["kv_bytes"] == 360 / 7
    assert rounds.of(slice(1, 2)).summary()["acceptance"] == [1.0]


@pytest.mark.parametrize(
    ("fields", "options", "error", "message"),
    (
        ({}, {"verify": 0}, ValueError, r"verify 0 is below 1; use None"),
        ({}, {"verify": True}, TypeError, r"verify is True; give a whole number"),
        ({"method": "full"}, {}, ValueError, r"method 'full', whose drafts would read as much .*'quest'"),
        ({"method": "h2o"}, {}, ValueError, r"method 'h2o', evict None, which evicts .*'quest' or 'retro'"),
        ({"method": "streaming"}, {}, ValueError, r"method 'streaming', evict None, which evicts"),
        (
            {"evict": "tova", "cache_tokens": 64},
            {},
            ValueError,
            r"evict 'tova', which evicts .*without evict",
        ),
        ({"rectify_every": 4}, {}, ValueError, r"rectify_every 4, but every check .* rectify_every None"),
        ({}, {"verify": 64}, ValueError, r"verify 64 .*do not fit a cache of 64 tokens; use a smaller"),
        ({}, {"max_new_tokens": 90}, ValueError, r"take 92 positions, the cache holds 64"),
    ),
)
def test_what_cannot_be_verified_is_refused(fields, options, error, message):
    config = rj.DecodeConfig(**{"method": "quest", "page_size": 8, "budget_tokens": 24} | fields)
    options = {"max_new_tokens": 8, "capacity": 64, "verify": 2} | options
    with pytest.raises(error, match=message):
        rj.generate(MODEL, [[1, 2]], config, **options)


def test_a_cache_that_nothing_verified_is_refused():
    config = DRAFTS["quest"]
    first = rj.generate(MODEL, PROMPTS, config, 1, stop_tokens=[], capacity=CAPACITY)
    assert first.exact  # of the prompts alone
    sparse = rj.generate(MODEL, None, config, 3, stop_tokens=[], previous=first)
    assert not sparse.exact
    length = sparse.state.length
    with pytest.raises(ValueError, match=r"verify 2 .* previous has tokens that were decoded without"):
        rj.generate(MODEL, None, config, 3, stop_tokens=[], previous=sparse, verify=2)
    np.testing.assert_array_equal(sparse.state.length, length)  # nothing is lost


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"tokens": jnp.zeros(3, jnp.int32)}, ValueError, r"tokens has shape \(3,\), not \(4,\)"),
        ({"tokens": jnp.zeros(4)}, TypeError, r"tokens has dtype float32"),
        ({"k": 0}, ValueError, "verify 0 is below 1"),
        ({"k": 2.0}, TypeError, r"verify is 2.0; give a whole number"),
        ({"drafts": jnp.array([0, 4, 1, 1])}, ValueError, r"drafts\[1\] is 4, not within 0..3"),
        ({"drafts": jnp.array([0, 1, -1, 1])}, ValueError, r"drafts\[2\] is -1, not within 0..3"),
        ({"active": jnp.ones(4)}, TypeError, "active has dtype float32; give truth values"),
        ({"keys": jax.random.split(jax.random.key(0), 2)}, ValueError, r"keys has shape \(2,\), not \(4,\)"),
        ({"stop_tokens": jnp.zeros((1, 1), jnp.int32)}, ValueError, r"stop_tokens has shape \(1, 1\)"),
    ),
)
def test_arguments_of_a_step_are_checked(options, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without the checks of tests
    config = DRAFTS["quest"]
    state = jax.eval_shape(lambda: rj.init_state(MODEL.config, config, 4, CAPACITY))
    arguments = {"tokens": jnp.zeros(4, jnp.int32), "k": K} | options
    with pytest.raises(error, match=message):
        rj.verified_step(MODEL.params, MODEL.config, config, state, **arguments)
