"""Presets: what each is, and the names that they had."""

import logging

import pytest

import retro_jax as rj
from retro_jax.experiments.compare.ladder import LADDER, ladder
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.presets import EARLIER_NAMES, PRESETS, preset_fields

FULL = rj.DecodeConfig("full", sink_pages=0)


def test_only_the_papers_revises():
    assert {name: rj.preset(name).attention.revises for name in PRESETS} == {
        "quest": False, "paper": True, "mean-key": False
    }  # fmt: skip
    assert rj.preset() == rj.preset("mean-key")


@pytest.mark.parametrize("budget", (128.0, 0.15))
def test_the_ladder_leads_from_one_preset_to_another(budget):
    fields = budget_fields(budget)
    steps = ladder(FULL, fields)
    assert len(set(steps)) == len(LADDER)
    assert (steps[0], steps[-1]) == (rj.preset("quest", **fields), rj.preset("mean-key", **fields))


def test_the_recommended_reads_pages_of_the_size_that_kernels_take_and_a_window_can_be_added():
    config = rj.preset("mean-key", method="retro", window=4)
    assert (config.page_size, config.residual_pages, config.slots) == (16, 0, 4)


def test_an_earlier_name_is_taken_and_said_to_be_one(caplog):
    with caplog.at_level(logging.WARNING):
        assert rj.preset("retro", budget_tokens=64) == rj.preset("mean-key", budget_tokens=64)
    assert len(caplog.records) == 1
    assert "preset 'retro' is 'mean-key' now, which does not revise" in caplog.text
    assert not EARLIER_NAMES.keys() & PRESETS.keys()


def test_an_unknown_name():
    with pytest.raises(
        ValueError,
        match=r"preset 'men-key' is unknown \(did you mean 'mean-key'\?\)",
    ):
        preset_fields("men-key")
