"""Bad input gets an error at the door that names the value, the limit and the way out."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import retro_jax as rj
from tests.retro_jax.tiny import tiny, token_ids

CONFIG = rj.DecodeConfig(page_size=8, budget_tokens=24)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        (
            {"method": "retra"},
            r"method 'retra' is unknown .did you mean 'retro'.*; use one of full, quest",
        ),
        ({"window": 0}, r"window 0 is below 1"),
        (
            {"method": "quest", "window": 4},
            r"'quest' serves only the newest query, window 4 .*use method 'retro'",
        ),
        ({"page_size": 0}, r"page_size 0 is below 1"),
        ({"dense_layers": -1}, r"dense_layers -1 is below 0"),
        ({"sink_pages": -1}, r"sink_pages -1 is below 0"),
        ({"prefill_chunk": 0}, r"prefill_chunk 0 is below 1"),
        ({"budget": 0.0}, r"budget 0.0 is not a share in \(0, 1\]; use budget_tokens"),
        ({"budget": 15}, r"budget 15 is not a share in \(0, 1\]; use budget_tokens"),
        ({"budget_tokens": 16}, r"budget_tokens 16 is below the 2 pages of 16 .*must exceed 16"),
        ({"budget_tokens": 40, "sink_pages": 3}, r"budget_tokens 40 is below the 4 pages"),
        ({"budget_floor": 0}, r"budget_floor 0 is below the 2 pages"),
        ({"statistics": "median"}, r"statistics 'median' are unknown; use None or one of min_max, mean_key"),
        ({"score": "cosine"}, r"score 'cosine' is unknown; use one of bounds, mean_key"),
        (
            {"score": "mean_key", "statistics": "min_max"},
            r"reads mean_key or mean_key_int8 statistics, not 'min_max'; use statistics=None",
        ),
        ({"group_reduce": "sum"}, r"group_reduce 'sum' is unknown; use one of mean, max, mass"),
        ({"residual_pages": -1}, r"residual_pages -1 is below 0"),
        (
            {"residual_pages": 8},
            r"residual_pages 8 estimates .* score 'bounds' keeps 'min_max' .*; use score 'mean_key'",
        ),
        (
            {"residual_pages": 8, "method": "tova"},
            r"residual_pages 8 .* method 'tova', which selects no pages by a score; use method 'quest'",
        ),
        (
            {"residual_pages": 8, "score": "mean_key", "evict": "h2o", "cache_tokens": 512},
            r"residual_pages 8 .* evict 'h2o', whose pages are gone for good; use only one",
        ),
        ({"budget_covers": "all"}, r"budget_covers 'all' is unknown; use 'pages' or 'traffic'"),
        (
            {"budget_covers": "traffic", "method": "streaming"},
            r"'traffic' .* method 'streaming', evict None, which evicts .*; use method 'quest' or 'retro'",
        ),
        (
            {"method": "streaming", "window": 2},
            r"'streaming' serves only the newest query, window 2 .*the earlier queries too.*'retro'",
        ),
        ({"method": "snapkv", "observation": 0}, r"observation 0 is below 1"),
        (
            {"method": "snapkv", "budget_tokens": 48},
            r"budget of 48 tokens is below the 4 pages .*observation=32 and sink_pages=1; lower observation",
        ),
        (
            {"method": "tova", "evict": "h2o", "cache_tokens": 512},
            r"evict 'h2o' .* method 'tova', which selects no pages; use method 'quest' or 'retro'",
        ),
        ({"evict": "streaming"}, r"evict 'streaming' is not possible; use one of tova, h2o"),
        (
            {"evict": "hxo", "rectify_every": 2},
            r"rectify_every 2 .* evict 'hxo', which evicts pages .*; use method 'quest' or 'retro' without",
        ),
        ({"evict": "h2o"}, r"cache_tokens None is below budget_floor 256; set how many tokens evict='h2o'"),
        (
            {"evict": "h2o", "budget_tokens": 512, "cache_tokens": 500},
            r"cache_tokens 500 is below budget_tokens 512",
        ),
        *(
            (
                {name: value, "method": method},
                rf"{name} {value} .* method '{method}'.*; use method 'quest' or",
            )
            for name, value in (("budget_top_p", 0.9), ("anchor_every", 4), ("select_every", 4))
            for method in ("full", "tova")
        ),
        *(
            ({"budget_top_p": p}, rf"budget_top_p {p} is not between 0 and 1; use None")
            for p in (0.0, 1.0, -0.5)
        ),
        ({"budget_top_p": float("nan")}, r"budget_top_p nan is not between 0 and 1"),
        ({"budget_top_p": 0.9, "score": "random"}, r"budget_top_p 0.9 .* score 'random' gives none"),
        (
            {"budget_top_p": 0.9, "evict": "h2o", "cache_tokens": 512},
            r"budget_top_p 0.9 .* evict 'h2o', which",
        ),
        ({"anchor_every": 0}, r"anchor_every 0 is below 1"),
        ({"anchor_every": 2, "evict": "h2o", "cache_tokens": 512}, r"anchor_every 2 .* evict 'h2o', which"),
        ({"select_every": -1}, r"select_every -1 is below 1"),
        *(
            (
                {name: 2, "score": "mean_key", "residual_pages": 8},
                rf"{name} 2 .* residual_pages 8, which reads",
            )
            for name in ("anchor_every", "select_every")
        ),
        ({"implementation": "triton"}, r"implementation 'triton' is unknown; use None or one of xla"),
    ),
)
def test_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.DecodeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"temperature": -1.0}, "temperature -1.0 is below 0"),
        ({"temperature": float("nan")}, "temperature nan is below 0"),
        ({"top_k": 0}, "top_k 0 is below 1"),
        ({"top_p": 0.0}, r"top_p 0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1.5 is not in \(0, 1\]"),
    ),
)
def test_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.Sampling(**fields)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    (
        ([], {}, ValueError, "prompts are empty"),
        ([[]], {}, ValueError, "prompt 0 is empty; give at least one token"),
        ([[1], []], {}, ValueError, "prompt 1 is empty"),
        ([""], {}, ValueError, "has no tokenizer; give prompt 0 as token ids"),
        (["hello"], {}, ValueError, "tiny-group-3 has no tokenizer; give prompt 0 as token ids"),
        ("hello", {}, TypeError, "prompts must be a list"),
        ([[1, 96]], {}, ValueError, r"token id 96, outside the vocabulary of tiny-group-3 \(0\.\.95\)"),
        ([[-1]], {}, ValueError, r"token id -1, outside the vocabulary"),
        ([np.array([1.5])], {}, TypeError, "prompt 0 has dtype float64; token ids are whole numbers"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens 0 .* at least 1"),
        ([[1]], {"max_new_tokens": 1.5}, TypeError, r"max_new_tokens is 1\.5; give a whole number"),
        ([[1]], {"capacity": "64"}, TypeError, "capacity is '64'; give a whole number"),
        ([[1] * 250], {}, ValueError, "take 260 positions, tiny-group-3 has 256; shorten the prompt"),
        ([[1] * 25], {"capacity": 30}, ValueError, "take 35 positions, the cache holds 30"),
        ([[1]], {"capacity": 300}, ValueError, r"capacity 300 is not within 1\.\.256, the positions"),
        ([[1]], {"stop_tokens": [96]}, ValueError, r"stop token 96 lies outside the vocabulary \(0\.\.95\)"),
    ),
)
def test_generate(prompts, options, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without the checks of tests
    options = {"max_new_tokens": 10} | options
    with pytest.raises(error, match=message):
        rj.generate(tiny(3), prompts, CONFIG, **options)


def test_a_next_turn():
    first = rj.generate(tiny(3), [[1, 2, 3]], CONFIG, 5, capacity=64)
    with pytest.raises(ValueError, match=r"previous turn was decoded by DecodeConfig.*this one must be too"):
        rj.generate(
            tiny(3), [[1]], rj.DecodeConfig(page_size=8, budget_tokens=24, window=2), 5, previous=first
        )
    with pytest.raises(ValueError, match="2 prompts cannot continue 1 sequences"):
        rj.generate(tiny(3), [[1], [2]], CONFIG, 5, previous=first)
    with pytest.raises(ValueError, match="take 65 positions, the cache holds 64; pass a larger capacity"):
        rj.generate(tiny(3), [[1]], CONFIG, 56, previous=first)
    rj.generate(tiny(3), [[1]], CONFIG, 2, previous=first)  # refused calls left the state as it was
    with pytest.raises(ValueError, match="previous was continued before"):
        rj.generate(tiny(3), [[1]], CONFIG, 2, previous=first)


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    (
        (np.zeros((2, 3, 4), int), {}, ValueError, r"shape \(2, 3, 4\); give \[T\], \[B, T\] or a list"),
        (np.zeros((2, 20), int), {"prompt_tokens": (3, 4, 5)}, ValueError, "has 3 numbers for 2 texts"),
        (np.zeros(0, int), {}, ValueError, "token_ids is empty"),
        (np.zeros(20), {}, TypeError, "token_ids has dtype float64"),
        (np.full(20, 96), {}, ValueError, "token id 96, outside the vocabulary"),
        (np.zeros(20, int), {"prompt_tokens": 20}, ValueError, r"prompt_tokens 20 is not within 1\.\.19"),
        (np.zeros(20, int), {"prompt_tokens": 0}, ValueError, r"prompt_tokens 0 is not within 1\.\.19"),
        (np.zeros(300, int), {}, ValueError, "take 300 positions, tiny-group-3 has 256"),
        (np.zeros(20, int), {"capacity": 16}, ValueError, "take 20 positions, the cache holds 16"),
        (np.zeros(20, int), {"steps_per_call": 0}, ValueError, "steps_per_call 0 must be at least 1"),
        (np.zeros(20, int), {"prompt_tokens": 2.5}, TypeError, r"prompt_tokens is 2\.5; give a whole number"),
        ([np.zeros(20, int), np.full(20, 96)], {}, ValueError, "token_ids has token id 96, outside"),
        ([2**70, 1], {}, ValueError, "token_ids has token id 1180591620717411303424, outside"),
    ),
)
def test_score(tokens, options, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    options = {"prompt_tokens": 8} | options
    with pytest.raises(error, match=message):
        rj.score(tiny(3), tokens, CONFIG, **options)


@pytest.mark.parametrize(
    ("made", "fields", "message"),
    (
        (rj.DecodeConfig, {"budget_tokens": 48.5}, "budget_tokens is 48.5; give a whole number or None"),
        (rj.DecodeConfig, {"page_size": 16.0}, "page_size is 16.0; give a whole number"),
        (rj.DecodeConfig, {"window": True}, "window is True; give a whole number or None"),
        (rj.DecodeConfig, {"overwrite": 1}, "overwrite is 1; give True or False"),
        (rj.DecodeConfig, {"budget": "0.1"}, "budget is '0.1'; give a number"),
        (rj.DecodeConfig, {"method": ["quest"]}, r"method is \['quest'\]; give a word"),
        (rj.Sampling, {"top_k": 3.0}, "top_k is 3.0; give a whole number or None"),
        (rj.Sampling, {"seed": 1.5}, "seed is 1.5; give a whole number"),
    ),
)
def test_types_of_fields(made, fields, message):
    with pytest.raises(TypeError, match=message):
        made(**fields)


def test_seeds():
    assert rj.Sampling(temperature=1, seed=2**32 - 1).seed == 2**32 - 1
    for made in (lambda seed: rj.Sampling(seed=seed), lambda seed: rj.DecodeConfig(score_seed=seed)):
        for seed in (-1, 2**32):
            with pytest.raises(ValueError, match=rf"seed {seed} is not within 0\.\.4294967295"):
                made(seed)


def test_meshes_states_and_prompts_of_texts():
    with pytest.raises(ValueError, match="data 0 must be at least 1"):
        rj.make_mesh(0, 1)
    with pytest.raises(ValueError, match="prompt_tokens has 1 numbers for 2 texts; give one for each"):
        rj.score(tiny(3), [[1, 2, 3], [1, 2, 3]], CONFIG, [1])
    state = rj.init_state(tiny(3).config, CONFIG, 2, 64)
    assert repr(state) == "DecodeState(2 sequences, 3 layers, 64 tokens)"


def test_the_pure_functions():
    model, tokens = tiny(3), jnp.asarray(token_ids(1, 20))
    with pytest.raises(ValueError, match="batch 0 is below 1"):
        rj.init_state(model.config, CONFIG, 0, 16)
    with pytest.raises(ValueError, match="prompts of up to 20 tokens do not fit a capacity of 16"):
        rj.prefill(model.params, model.config, CONFIG, tokens, jnp.array([20]), 16)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    (
        (
            tiny(3),
            rj.DecodeConfig(window=2, page_size=8, budget_tokens=24),
            r"hidden is float32\[2, 3, 32\], not",
        ),
        (tiny(3), rj.DecodeConfig("full", page_size=8), r"hidden is .*, and \d+ more\); use those that"),
        (tiny(2), CONFIG, r"layers.2.outputs.o is float32\[2, 3, 6, 16\], not float32\[2, 3, 4, 16\]"),
        (tiny(3, layers=4), CONFIG, r"layers.3.pages is missing, not float32"),
    ),
)
def test_a_state_goes_on_as_it_was_made(model, config, message):
    state = rj.init_state(tiny(3).config, CONFIG, 2, 64)
    arguments, ids = (model.params, model.config, config, state), jnp.ones((2, 3), int)
    message = "made with another configuration or model .*" + message
    with pytest.raises(ValueError, match=message):
        rj.decode_step(*arguments, ids[:, 0])
    with pytest.raises(ValueError, match=message):
        rj.extend(*arguments, ids, jnp.array([3, 3]))


def test_ids_outside_the_vocabulary():
    model, vocab = tiny(3), tiny(3).config.vocab_size
    arguments = model.params, model.config, CONFIG
    state = rj.init_state(model.config, CONFIG, 2, 64)
    for bad in (vocab, -1):
        ids = jnp.array([[1, 2], [bad, 3]])
        message = rf"is {bad}, not within 0\.\.{vocab - 1}, the vocabulary"
        with pytest.raises(ValueError, match=r"tokens\[1\] " + message):
            rj.decode_step(*arguments, state, ids[:, 0])
        for function, rest in (
            (rj.extend, (state, ids, jnp.array([2, 1]))),
            (rj.prefill, (ids, jnp.array([2, 1]), 64)),
        ):
            with pytest.raises(ValueError, match=r"tokens\[1, 0\] " + message):
                function(*arguments, *rest)
    # What pads or does not count may be anything.
    beside = jnp.array([True, False])
    assert rj.decode_step(*arguments, state, jnp.array([1, -1]), beside)[0].length.tolist() == [1, 0]


KEYS = jax.random.split(jax.random.key(0), 2)
IDS, FLAGS, FLOATS = (lambda *shape: jnp.zeros(shape, int)), (lambda *shape: jnp.ones(shape, bool)), jnp.zeros


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    (
        ("decode_step", (IDS(2, 1),), ValueError, r"tokens has shape \(2, 1\), not \(2,\): one for each seq"),
        ("decode_step", (IDS(3),), ValueError, r"tokens has shape \(3,\), not \(2,\)"),
        ("decode_step", (IDS(),), ValueError, r"tokens has shape \(\), not \(2,\)"),
        ("decode_step", (FLOATS(2),), TypeError, "tokens has dtype float32; give whole numbers"),
        ("decode_step", (IDS(2), FLAGS(1)), ValueError, r"active has shape \(1,\), not \(2,\)"),
        ("decode_step", (IDS(2), IDS(2)), TypeError, r"active has dtype int32; give truth values \(bool\)"),
        ("decode", (IDS(2, 1), 3), ValueError, r"first_tokens has shape \(2, 1\), not \(2,\)"),
        ("decode", (IDS(2), 3, None, KEYS[:1]), ValueError, r"keys has shape \(1,\), not \(2,\)"),
        ("decode", (IDS(2), 3, None, IDS(2, 2)), TypeError, "keys are not typed; make them by"),
        ("decode", (IDS(2), 3, None, None, IDS(1, 2)), ValueError, r"stop_tokens has shape \(1, 2\)"),
        ("decode", (IDS(2), 3, None, None, None, IDS(1)), ValueError, r"remaining has shape \(1,\)"),
        ("teacher_force", (IDS(1, 3), IDS(1, 3), FLAGS(1, 3)), ValueError, r"tokens has shape \(1, 3\)"),
        ("teacher_force", (IDS(2, 3), IDS(2, 2), FLAGS(2, 3)), ValueError, r"targets has shape \(2, 2\)"),
        ("teacher_force", (IDS(2, 3), IDS(2, 3), FLAGS(2, 1)), ValueError, r"active has shape \(2, 1\)"),
        (
            "extend",
            (IDS(2), IDS(2)),
            ValueError,
            r"tokens has shape \(2,\); give \[B, T\], at least one",
        ),
        ("extend", (IDS(2, 0), IDS(2)), ValueError, r"tokens has shape \(2, 0\)"),
        (
            "extend",
            (IDS(1, 4), IDS(1)),
            ValueError,
            r"tokens has shape \(1, 4\), not \(2, 4\): a row for",
        ),
        (
            "extend",
            (IDS(2, 4), IDS(1)),
            ValueError,
            r"lengths has shape \(1,\), not \(2,\): one for each",
        ),
        ("extend", (IDS(2, 4), FLOATS(2)), TypeError, "lengths has dtype float32"),
        ("extend", (IDS(2, 4), IDS(2) + 5), ValueError, r"lengths\[0\] is 5, not within 0\.\.4, the tokens"),
        ("extend", (IDS(2, 4), IDS(2) - 1), ValueError, r"lengths\[0\] is -1, not within 0\.\.4"),
        (
            "extend",
            (IDS(2, 4), IDS(2) + 4),
            ValueError,
            "sequence 1 has room for 3 more tokens, 4 were",
        ),
        ("prefill", (IDS(2, 4), IDS(2), 8), ValueError, r"lengths\[0\] is 0, not within 1\.\.4"),
        ("prefill", (IDS(2, 4), IDS(3), 8), ValueError, r"lengths has shape \(3,\), not \(2,\)"),
    ),
)
def test_arguments_of_the_pure_functions(function, arguments, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without the checks of tests
    model = tiny(3)
    if function != "prefill":
        state = rj.init_state(model.config, CONFIG, 2, 64).replace(length=jnp.array([0, 61]))
        arguments = (state, *arguments)
    with pytest.raises(error, match=message):
        getattr(rj, function)(model.params, model.config, CONFIG, *arguments)
