"""One trace serves a whole generation, and the compiled step copies no cache."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

import retro_jax as rj
from retro_jax import models
from tests.retro_jax.tiny import tiny, token_ids

CONFIGS = {
    "full": rj.DecodeConfig("full", page_size=8),
    "h2o": rj.DecodeConfig("h2o", page_size=8, budget_tokens=32, dense_layers=1),
    "quest": rj.DecodeConfig("quest", page_size=8, budget_tokens=32, dense_layers=1),
    "retro": rj.DecodeConfig("retro", page_size=8, budget=0.2, budget_floor=16, dense_layers=1),
    "taken over": rj.DecodeConfig(
        "quest", page_size=8, budget_tokens=32, dense_layers=1, anchor_every=2, select_every=4
    ),
    "rectified": rj.DecodeConfig("quest", page_size=8, budget_tokens=32, dense_layers=1, rectify_every=4),
}


def test_one_trace_of_the_decode_step_for_generations_of_any_length(monkeypatch):
    module = importlib.import_module("retro_jax.decode")  # the package exports the function of the same name
    traces, original = [], module.decode_step

    def counted(*args):
        traces.append(1)
        return original(*args)

    monkeypatch.setattr(module, "decode_step", counted)
    prompts = token_ids(2, 11).tolist()
    for new_tokens, prompt_tokens in ((100, 11), (37, 2), (60, 7)):
        shorter = [prompt[:prompt_tokens] for prompt in prompts]
        result = rj.generate(tiny(3), shorter, CONFIGS["retro"], new_tokens, capacity=123)
        assert [len(tokens) for tokens in result.tokens] == [new_tokens] * 2
    assert len(traces) == 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("loop", "dtype"), (("step", "float32"), ("scan", "float32"), ("scan", "bfloat16")))
def test_the_cache_is_updated_in_place(name, loop, dtype):
    capacity = 2**19  # one layer's cache outweighs everything else
    config = CONFIGS[name]
    model = dataclasses.replace(tiny(3).config, max_positions=capacity, dtype=dtype)
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    state = jax.eval_shape(lambda: rj.init_state(model, config, 1, capacity))
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)

    def run(params, state, tokens):
        if loop == "step":
            return rj.decode_step(params, model, config, state, tokens)
        return rj.decode(params, model, config, state, tokens, 4)

    compiled = jax.jit(run, donate_argnums=1).lower(params, state, tokens).compile()
    pages = state.layers[0].pages
    assert compiled.memory_analysis().temp_size_in_bytes < pages.size * pages.dtype.itemsize


@pytest.mark.parametrize(("name", "dtype"), (("quest", "float32"), ("retro", "bfloat16")))
def test_drafts_and_checks_update_the_cache_in_place(name, dtype):
    capacity = 2**19
    model = dataclasses.replace(tiny(3).config, max_positions=capacity, dtype=dtype)
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    state = jax.eval_shape(lambda: rj.init_state(model, CONFIGS[name], 1, capacity))
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)

    def run(params, state, tokens):
        return rj.verified_decode(params, model, CONFIGS[name], state, tokens, 4, 3)

    compiled = jax.jit(run, donate_argnums=1).lower(params, state, tokens).compile()
    pages = state.layers[0].pages
    assert compiled.memory_analysis().temp_size_in_bytes < pages.size * pages.dtype.itemsize


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_one_kind_are_lowered_once(name):
    def functions(layers):
        model = tiny(3, layers=layers).config
        params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
        state = jax.eval_shape(lambda: rj.init_state(model, CONFIGS[name], 1, 128))
        tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
        step = jax.jit(rj.decode_step, static_argnums=(1, 2))
        text = step.lower(params, model, CONFIGS[name], state, tokens).as_text()
        return text.count("func.func"), text.count("stablehlo.dot_general")

    assert functions(9) == functions(5)  # the last two layers are of their own kinds in both
