"""The laws of decoding on a model with a dense layer and one with experts."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import mixture_of_experts
from retro_jax import models
from retro_jax.mlp import mlp
from retro_jax.models import Experts, LayerKind, ModelConfig
from retro_jax.models.experts import expert_bytes
from tests.retro_jax.tiny import ATOL, VOCAB, begin, force, token_ids

MODEL = ModelConfig(
    "tiny-experts", VOCAB, 2, 4, 2, 16, 32, 24, max_positions=256,
    layer_kinds=(LayerKind(), LayerKind(mlp="experts")),
    experts=Experts(6, 2, 16, biases=True),
)  # fmt: skip
ALL = rj.DecodeConfig("retro", window=2, page_size=8, budget_tokens=64, dense_layers=0)
FEW = dataclasses.replace(ALL, budget_tokens=16)
LENGTHS, STEPS = [24, 17, 9, 20], 6
BYTES = expert_bytes(MODEL)


@pytest.fixture(scope="module")
def model() -> rj.Model:
    return rj.Model(MODEL, models.random_params(MODEL, jax.random.key(0)), tokenizer=None)


def decoded(model: rj.Model, config: rj.DecodeConfig):
    """Logits [steps, 4, V] and the last state."""
    tokens = token_ids(4, 40)
    state, _ = begin(model, config, tokens, LENGTHS, 64)
    state, logits = force(model, config, state, tokens, STEPS)
    return logits, state


@pytest.fixture(scope="module")
def few(model):
    return decoded(model, FEW)


def test_the_budget_of_all_pages_is_full_attention(model):
    logits, _ = decoded(model, ALL)
    full = np.asarray(models.forward(model.params, MODEL, token_ids(4, 40)))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[:, row], full[row, length : length + STEPS], atol=ATOL)


def test_sharded_is_unsharded(model, few):
    mesh = rj.make_mesh(2, 2)
    params = rj.shard_params(model.params, MODEL, mesh)
    experts = params.layers[1].experts
    assert "6 experts of hidden width 16, 2 for each token" in repr(model)
    assert experts.gate_up.sharding.shard_shape(experts.gate_up.shape) == (6, 32, 16)
    assert experts.down.sharding.shard_shape(experts.down.shape) == (6, 8, 32)
    with jax.set_mesh(mesh):
        logits, state = decoded(rj.Model(MODEL, params, None), FEW)
    np.testing.assert_allclose(logits, few[0], atol=ATOL)
    # Each half of the sequences reads its own experts.
    read = np.asarray(state.metrics.expert_bytes).reshape(2, 2)
    assert (read[:, :1] == read).all() and (2 * read[:, 0] <= 6 * BYTES).all()
    assert read.sum() >= few[1].metrics.expert_bytes.sum()


def test_a_sequence_does_not_depend_on_its_mates_and_shares_what_they_read(model, few):
    tokens = token_ids(4, 40)
    state, _ = begin(model, FEW, tokens, LENGTHS, 64)
    alone, logits = jnp.array([False, True, False, False]), []
    masked = jax.jit(rj.decode_step, static_argnames=("model", "config"))
    for step in range(STEPS):
        newest = tokens[np.arange(4), np.array(LENGTHS) + step]
        state, out = masked(model.params, MODEL, FEW, state, jnp.asarray(newest), alone)
        logits.append(np.asarray(out)[1])
    np.testing.assert_allclose(np.stack(logits), few[0][:, 1], atol=ATOL)
    read, together = (np.asarray(each.metrics.expert_bytes) for each in (state, few[1]))
    assert not read[[0, 2, 3]].any() and read[1] % BYTES == 0
    # Two tokens choose two experts each; those of four sequences some of all six.
    assert 2 * BYTES <= read[1] <= 4 * BYTES
    assert read[1] < together.sum() <= 6 * BYTES and len({*together}) == 1


@pytest.mark.parametrize(("implementation", "calls"), [(None, 1), ("xla", 0)])
def test_few_tokens_take_the_operation_on_a_gpu(model, monkeypatch, implementation, calls):
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    arguments = model.params.layers[1], MODEL, x, jnp.ones((2, 3), bool)
    expected, read = mlp(*arguments, None)
    asked = []

    def counted(*args, **options):
        asked.append(options["implementation"])
        return mixture_of_experts(*args, **options)

    monkeypatch.setattr("retro_jax.mlp.traced_for", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.setattr("retro_jax.mlp.mixture_of_experts", counted)
    out, read_so = mlp(*arguments, implementation)
    np.testing.assert_allclose(out, expected, atol=ATOL)
    np.testing.assert_array_equal(read_so, read)
    assert asked == [None] * calls


def test_metrics_tell_the_bytes_of_experts(model):
    prompts = [list(range(20)), list(range(30))]
    metrics = rj.generate(model, prompts, FEW, max_new_tokens=4).metrics
    assert metrics.summary()["expert_bytes"] == pytest.approx(metrics.expert_bytes.sum() / 6)
    assert BYTES <= metrics.summary()["expert_bytes"] <= 3 * BYTES
    np.testing.assert_array_equal(metrics.of(slice(1)).expert_bytes, metrics.expert_bytes[:, :1])


def test_a_mesh_that_does_not_divide_experts_is_refused(model):
    config = dataclasses.replace(MODEL, experts=dataclasses.replace(MODEL.experts, hidden_width=15))
    with pytest.raises(ValueError, match="hidden_width of experts 15 does not divide over 2 devices"):
        rj.shard_params(model.params, config, rj.make_mesh(1, 2))
