"""A decode step ends on no chip in anything but kernels, or refusals in words that the log tells once."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from retro_jax import decode_step, init_state, models, preset
from retro_jax.experiments.bench.chips import Case, on_chip, refusals
from retro_jax.experiments.bench.kernel_pairs import page


def test_the_page_is_what_kernels_say():
    """Whole: an operation that a kernel takes or refuses otherwise, or in other words, is another page."""
    assert page() == Path("docs/kernels.md").read_text(), (
        "run python -m retro_jax.experiments.bench.kernel_pairs --out docs/kernels.md"
    )


@pytest.mark.parametrize(
    ("chip", "residual", "count"),
    [("H100, H200", 8, 2), ("H100, H200", 0, 0), ("v5e", 8, 2), ("v5e", 0, 0)],
)
def test_a_whole_step_of_the_best_preset_logs_each_refusal_once(chip, residual, count, caplog):
    case = Case(preset("mean-key", residual_pages=residual, dense_layers=1))
    dispatch._warn_once.cache_clear()
    model = case.model
    state = jax.eval_shape(lambda: init_state(model, case.config, 1, case.capacity))
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    with on_chip(chip), caplog.at_level(logging.WARNING):
        jax.eval_shape(
            lambda *args: decode_step(args[0], model, case.config, *args[1:]), params, state, tokens
        )
    expected = sorted(f"{reason}; using the XLA reference" for reason in refusals(case, chip).values())
    assert len(expected) == count
    assert sorted(record.message for record in caplog.records) == expected


@pytest.mark.parametrize(
    ("chip", "kernels", "channels", "page_size", "selects"),
    (
        ("H100, H200", "mosaic_gpu", 64, 16, True),
        ("H100, H200", "mosaic_gpu", 32, 8, True),
        ("H100, H200", "mosaic_gpu", 16, 8, True),
        ("H100, H200", "mosaic_gpu", 48, 16, False),
        ("v5e", "mosaic_tpu", 64, 16, True),
        ("v5e", "mosaic_tpu", 32, 16, False),
    ),
)
def test_a_learned_score_selects_through_kernels(chip, kernels, channels, page_size, selects):
    learned = {"score": "learned", "score_channels": channels, "page_size": page_size}
    found = refusals(Case(preset("mean-key", **learned, dense_layers=1)), chip)
    assert (
        found.pop("summaries") == f"refresh_statistics of 'mean_key_int8' has no {kernels!r} implementation"
    )
    if selects:
        assert not found
    else:
        assert found.keys() == {"selection"} and f"head_dim {channels} has no" in found["selection"]
