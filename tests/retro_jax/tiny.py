"""Small random models and the loops that the tests of this folder share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import retro_jax as rj
from retro_jax import models
from retro_jax.models import ModelConfig, transformer

VOCAB = 96
ATOL = 1e-5  # float32, logits of order one
CENTROIDS = {
    "score": "mean_key",
    "statistics": "mean_key_int8",
    "group_reduce": "mass",
    "residual_pages": 2,
    "budget_covers": "traffic",
}
"""All that selects and loads otherwise than Quest, in small: preset mean-key, and residuals beside it."""

prefill = jax.jit(rj.prefill, static_argnames=("model", "config", "capacity"))
step = jax.jit(rj.decode_step, static_argnames=("model", "config"), donate_argnames="state")


@functools.cache
def tiny(group: int = 2, layers: int = 3) -> rj.Model:
    """A float32 model with two KV heads of 16 channels and random weights."""
    config = ModelConfig(
        name=f"tiny-group-{group}",
        vocab_size=VOCAB,
        num_layers=layers,
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=16,
        width=32,
        hidden_width=64,
        max_positions=256,
    )
    return rj.Model(config, models.random_params(config, jax.random.key(group)), tokenizer=None)


@functools.cache
def token_ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids [batch, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def begin(model: rj.Model, config: rj.DecodeConfig, tokens: np.ndarray, lengths, capacity: int):
    """The state after prefill of prompts of different lengths out of `tokens`, and the logits.

    Prefill does not depend on a method that evicts nothing: it is compiled once for all such configurations
    with the same pages, which are then put into a fresh state of this one.
    """
    lengths = np.asarray(lengths, np.int32)
    prompts = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    if config.eviction or config.residual_pages or config.cache_dtype:
        return prefill(model.params, model.config, config, prompts, lengths, capacity=capacity)
    plain = rj.DecodeConfig(
        "quest", page_size=config.page_size, dense_layers=0, statistics=config.statistics, score=config.score
    )
    filled, logits = prefill(model.params, model.config, plain, prompts, lengths, capacity=capacity)
    state = rj.init_state(model.config, config, len(tokens), capacity)
    layers = tuple(
        fresh.replace(pages=layer.pages, statistics=None if fresh.statistics is None else layer.statistics)
        for fresh, layer in zip(state.layers, filled.layers, strict=True)
    )
    return state.replace(length=filled.length, layers=layers), logits


def force(model: rj.Model, config: rj.DecodeConfig, state, tokens: np.ndarray, steps: int, observe=None):
    """Decode `steps` of the given tokens one by one; returns the state and logits [steps, B, V].

    `observe(state)` is called after every step.
    """
    rows, logits = np.arange(len(tokens)), []
    for _ in range(steps):
        newest = jnp.asarray(tokens[rows, np.asarray(state.length)])
        state, out = step(model.params, model.config, config, state, newest)
        logits.append(np.asarray(out))
        if observe:
            observe(state)
    return state, np.stack(logits)


def forced_logits(model, config, tokens, lengths, steps, capacity=None):
    """Logits [steps, B, V] of decoding along `tokens` after prompts of the given lengths."""
    state, _ = begin(model, config, tokens, lengths, capacity or tokens.shape[1])
    return force(model, config, state, tokens, steps)[1]


def assert_decided(logits):
    """That rounding decides between no two tokens, so that every program must choose the same."""
    second, best = np.moveaxis(np.sort(np.asarray(logits), axis=-1)[..., -2:], -1, 0)
    assert (best - second).min() > 10 * ATOL


def assert_same_tokens(model, config, prompt, got, expected, sampling=None, key=None):
    """That `got` continues `prompt` as `expected` does, up to where rounding decides between two tokens.

    There two programs, whose sums have other orders, may part, and what follows is another text. Another
    token anywhere else fails.

    Args:
      model: the model.
      config: of the generation.
      prompt: its token ids.
      got: the tokens of one program.
      expected: those of another.
      sampling: by which they were drawn; None for the most likely tokens.
      key: the sequence's random key.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    both = min(len(got), len(expected))
    if np.array_equal(got[:both], expected[:both]):
        assert len(got) == len(expected)
        return
    steps = int(np.argmax(got[:both] != expected[:both]))
    text = np.concatenate([prompt, expected])[None].astype(np.int32)
    state, logits = begin(model, config, text, [len(prompt)], text.shape[1])
    if steps:
        logits = force(model, config, state, text, steps)[1][-1]
    scores, temperature = np.asarray(logits[0]), 1.0
    if sampling is not None:
        temperature = sampling.temperature
        noise = jax.random.gumbel(jax.random.fold_in(key, len(prompt) + steps), scores.shape)
        scores = scores / temperature + np.asarray(noise)
    places = scores[[got[steps], expected[steps]]]
    assert (scores.max() - places <= 2 * ATOL / temperature).all(), (steps, places, scores.max())


@functools.partial(jax.jit, static_argnames=("model", "dense"))
def first_sparse_qkv(params, model, tokens, dense):
    """q, k, v of the first sparse layer for all tokens, by plain dense attention below it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = transformer.embed(params, tokens)
    for layer, kind in zip(params.layers[:dense], model.layers[:dense], strict=True):
        q, k, v = transformer.qkv(layer, model, kind, x, positions)
        x = transformer.attention_output(layer, x, transformer.causal_attention(q, k, v))
        x = transformer.mlp(layer, model, x)
    return transformer.qkv(params.layers[dense], model, model.layers[dense], x, positions)
