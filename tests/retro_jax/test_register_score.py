"""Statistics and scores of pages from outside the library."""

import dataclasses
import functools
import logging
import re
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import retro_jax as rj
from pallas_kernels import (
    IMPLEMENTATIONS,
    LOWEST,
    MEAN,
    SCORES,
    STATISTICS,
    VALUES,
    Fold,
    PageScore,
    PageStatistic,
    PageVector,
    dispatch,
    register_score,
)
from retro_jax import models
from retro_jax.experiments.bench.chips import Case, on_chip
from tests.retro_jax.tiny import ATOL, begin, force, tiny, token_ids


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    with mock.patch.dict(SCORES), mock.patch.dict(STATISTICS):
        yield


@pytest.fixture
def config():
    """The example's, small."""
    names = {}
    exec(textwrap.dedent(re.search(r"\n\n((?: {8}.*\n|\n)+)", register_score.__doc__)[1]), names)
    return dataclasses.replace(names["config"], page_size=4, budget_tokens=20, dense_layers=1, window=2)


def test_the_example_decodes_alike_on_one_device_and_on_four(config):
    model, tokens, steps = tiny(), token_ids(2, 64), 3
    assert config.kept_statistics == "bounds_mean"
    state, _ = begin(model, config, tokens, (50, 61), 64)
    sharded = rj.shard_state(jax.tree.map(jnp.copy, state), model.config, mesh := rj.make_mesh(2, 2))
    spread = rj.Model(model.config, rj.shard_params(model.params, model.config, mesh), None)
    state, logits = force(model, config, state, tokens, steps)
    with jax.set_mesh(mesh):
        sharded, found = force(spread, config, sharded, tokens, steps)
    np.testing.assert_allclose(found, logits, atol=ATOL)
    statistics = sharded.layers[-1].statistics
    assert statistics.kind == "bounds_mean"
    assert statistics.values.sharding.shard_shape(statistics.values.shape) == (1, 1, 16, 3, 16)
    page = np.asarray(state.layers[-1].pages)[:, :, 5, 0]  # keys of a whole page
    expected = np.stack([page.min(axis=2), page.max(axis=2), page.mean(axis=2)], axis=2)
    np.testing.assert_allclose(statistics.values[:, :, 5], expected, atol=1e-6)


def test_the_example_generates_and_reads_what_it_keeps(config):
    model = tiny()
    prompt = [token_ids(1, 30)[0].tolist()]
    result = rj.generate(model, prompt, config, max_new_tokens=3)
    by_bounds = rj.generate(model, prompt, dataclasses.replace(config, score="bounds"), max_new_tokens=3)
    more, fewer = (np.asarray(found.metrics.kv_bytes).sum(axis=0) for found in (result, by_bounds))
    assert (more > fewer).all()


@pytest.mark.parametrize(("chip", "kernels"), (("H100, H200", "mosaic_gpu"), ("v5e", "mosaic_tpu")))
def test_kernels_leave_the_example_to_the_reference_and_tell_it_once(config, chip, kernels, caplog):
    case = Case(dataclasses.replace(config, page_size=16))
    dispatch._warn_once.cache_clear()
    model = dataclasses.replace(case.model, num_layers=4, layer_kinds=None)
    state = jax.eval_shape(lambda: rj.init_state(model, case.config, 1, case.capacity))
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    step = functools.partial(rj.decode_step, model=model, config=case.config)
    with on_chip(chip), caplog.at_level(logging.WARNING):
        jax.eval_shape(step, params, state=state, tokens=jax.ShapeDtypeStruct((1,), jnp.int32))
    name = {"mosaic_gpu": "Mosaic GPU", "mosaic_tpu": "Mosaic TPU"}[kernels]
    assert sorted(record.message for record in caplog.records) == [
        f"refresh_statistics of 'bounds_mean' has no '{kernels}' implementation; using the XLA reference",
        f"score bound_or_mean has no {name} kernel (bounds, mean_key); using the XLA reference",
    ]


def statistic(*parts, name="mine"):
    return PageStatistic(name, parts)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        (statistic(PageVector(MEAN), name="min_max"), "a name that is taken .* than min_max, mean_key"),
        (statistic(), "statistic 'mine' has no vector"),
        (statistic(PageVector(MEAN, of=2)), "part 0 of statistic 'mine' is of 2; use KEYS or VALUES"),
        (
            statistic(PageVector(MEAN), PageVector(Fold(0.0, jnp.add, jnp.sum, lambda total, n: n))),
            r"part 1 of statistic 'mine' makes float32\[3, 1, 1\]",
        ),
    ),
)
def test_statistics_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rj.register_statistic(given)
    assert "mine" not in STATISTICS


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"name": "bounds", "coefficients": lambda q: [q]}, "score 'bounds' has a name that is taken"),
        ({"statistics": ("median",), "coefficients": lambda q: [q]}, "reads unknown statistics 'median'"),
        ({"statistics": (), "coefficients": lambda q: [q]}, "score 'mine' reads no statistics"),
        ({}, "both or neither of coefficients and function"),
        ({"coefficients": lambda q: [q, q]}, "score 'mine' makes .* 5 pages of 'mean_key'; needs"),
        ({"function": lambda q, vectors: q}, r"makes \(\(1, 2, 3, 8\), .* needs \(\(1, 2, 3, 5\)"),
    ),
)
def test_scores_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.register_score(PageScore(**{"name": "mine", "statistics": ("mean_key",)} | fields))
    assert "mine" not in SCORES


def test_a_statistic_may_be_of_values_and_of_terms():
    pages = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 8)), jnp.float32)
    valid = jnp.arange(4) < jnp.array([[4], [3], [1]])
    mine = statistic(PageVector(MEAN, of=VALUES, term=jnp.square), PageVector(LOWEST))
    assert not any(map(mine.fused_by, (None, *IMPLEMENTATIONS)))
    found = mine.compute(jnp.where(valid[:, None, :, None], pages, jnp.nan), valid)
    for page, count in enumerate((4, 3, 1)):
        keys, values = np.asarray(pages)[page, :, :count]
        np.testing.assert_allclose(found[page], [(values**2).mean(0), keys.min(0)], rtol=1e-6)
