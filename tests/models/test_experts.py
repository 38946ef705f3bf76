"""Experts against their definition in NumPy, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mixture_of_experts
from retro_jax.drafts import weight_bytes
from retro_jax.models import Experts, LayerKind, ModelConfig, random_params
from retro_jax.models import experts as module
from retro_jax.models.experts import apply_experts, expert_bytes, experts_read
from retro_jax.models.formats.weights import separate_weights

PLAIN = Experts(5, 2, 6)
CONFIG = ModelConfig("experts", 32, 1, 4, 2, 4, 8, 8, max_positions=16, experts=PLAIN)
KINDS = {
    "normalized": PLAIN,
    "softmax over all": dataclasses.replace(PLAIN, normalized=False),
    "gpt-oss": dataclasses.replace(PLAIN, biases=True, swiglu_limit=0.5, swiglu_alpha=1.7),
    "all of them": Experts(3, 3, 4),
}


def by_definition(weights: dict, experts: Experts, h: np.ndarray) -> np.ndarray:
    """One token's output, each expert by itself."""
    of = {name.removeprefix("layers.0.experts."): np.asarray(array) for name, array in weights.items()}
    logits = h @ of["router"] + of.get("router_bias", 0.0)
    chosen = np.argsort(-logits)[: experts.per_token]
    over = chosen if experts.normalized else np.arange(experts.count)
    out = np.zeros_like(h)
    for expert in chosen:
        gate, up = (
            h @ of[name][expert] + (of[f"{name}_bias"][expert] if experts.biases else 0)
            for name in ("gate", "up")
        )
        if experts.swiglu_limit is not None:
            gate, up = np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5) + 1
        y = (gate / (1 + np.exp(-experts.swiglu_alpha * gate)) * up) @ of["down"][expert]
        y = y + (of["down_bias"][expert] if experts.biases else 0)
        out += np.exp(logits[expert]) / np.exp(logits[over]).sum() * y
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_each_expert_by_itself(kind, monkeypatch):
    monkeypatch.setattr(module, "GROUP_ROWS", 4)  # of the 14 tokens, most experts have more
    config = dataclasses.replace(CONFIG, experts=KINDS[kind])
    params = random_params(config, jax.random.key(1))
    h = np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
    sizes = config.experts, config.parts
    out, read = apply_experts(params.layers[0].experts, *sizes, jnp.asarray(h), jnp.ones((2, 7), bool))
    at_once, read_at_once = apply_experts(
        params.layers[0].experts, *sizes, jnp.asarray(h), jnp.ones((2, 7), bool), mixture_of_experts
    )
    np.testing.assert_allclose(at_once, out, atol=1e-5)
    np.testing.assert_array_equal(read, read_at_once)
    weights = separate_weights(params, config)
    expected = [by_definition(weights, config.experts, token) for token in h.reshape(14, 8)]
    np.testing.assert_allclose(out.reshape(14, 8), expected, atol=1e-5)
    assert np.abs(expected).mean() > 0.05
    np.testing.assert_array_equal(read, np.full(2, config.experts.count / 2))


def test_only_the_experts_of_valid_tokens_are_read():
    """All others, and the tokens that do not count, are NaN."""
    experts = dataclasses.replace(PLAIN, count=9)
    config = dataclasses.replace(CONFIG, experts=experts)
    params = random_params(config, jax.random.key(2)).layers[0].experts
    rng = np.random.default_rng(1)
    h = rng.standard_normal((3, 2, 8)).astype(np.float32)
    valid = np.array([[True, True], [False, False], [False, True]])
    chosen = np.unique(np.argsort(-(h @ np.asarray(params.router)), -1)[valid][:, :2])
    assert 2 < len(chosen) < 7
    inputs = experts, config.parts, jnp.asarray(h), jnp.asarray(valid)
    expected, read = apply_experts(params, *inputs)
    others = np.setdiff1d(np.arange(9), chosen)
    poisoned = params.replace(
        gate_up=params.gate_up.at[others].set(np.nan), down=params.down.at[others].set(np.nan)
    )
    h = jnp.asarray(np.where(valid[..., None], h, np.nan))
    for how in (None, mixture_of_experts):
        out, _ = apply_experts(poisoned, experts, config.parts, h, inputs[-1], how)
        np.testing.assert_allclose(np.asarray(out)[valid], np.asarray(expected)[valid], atol=1e-5)
        assert not np.asarray(out)[~valid].any()
    # The two sequences with valid tokens share what is read.
    np.testing.assert_array_equal(read, np.array([len(chosen) / 2, 0, len(chosen) / 2], np.float32))


def test_experts_that_are_read_are_those_of_even_choices():
    """Two tokens: all but those that neither chose."""
    assert [round(experts_read(Experts(4, 1, 2), tokens), 6) for tokens in (0, 1, 2)] == [0, 1, 1.75]
    assert experts_read(Experts(3, 3, 2), 1) == 3
    config = dataclasses.replace(CONFIG, num_layers=2, layer_kinds=(LayerKind(), LayerKind(mlp="experts")))
    params = jax.eval_shape(lambda: random_params(config, jax.random.key(0)))
    without = weight_bytes(params, config, 0)
    assert weight_bytes(params, config, 1) - without == pytest.approx(2 * expert_bytes(config))
    assert weight_bytes(params, config, 10**6) == pytest.approx(without + 5 * expert_bytes(config))


def test_the_bytes_of_an_expert_are_those_of_its_weights():
    for experts in KINDS.values():
        config = dataclasses.replace(CONFIG, experts=experts)
        layer = random_params(config, jax.random.key(0)).layers[0].experts
        by_expert = layer.replace(router=None, router_bias=None)
        assert expert_bytes(config) * experts.count == sum(x.nbytes for x in jax.tree.leaves(by_expert))
    assert expert_bytes(ModelConfig("dense", 32, 1, 4, 2, 4, 8, 8, max_positions=16)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count of experts must be positive, got 0"),
        ({"per_token": 6}, "cannot go through 6 of 5 experts"),
        ({"swiglu_limit": -1.0}, r"swiglu_limit of experts must be positive, got -1\.0"),
    ],
)
def test_bad_experts(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **fields)
