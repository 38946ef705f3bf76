import pytest

from retro_jax import DecodeConfig, preset
from retro_jax.experiments.io.settings import distinct_names

QUEST, TOKENS = DecodeConfig("quest"), {"budget_tokens": 128}


@pytest.mark.parametrize(
    ("configs", "names"),
    [
        ([DecodeConfig("full"), QUEST, DecodeConfig()], ["full", "quest", "retro-w4"]),
        ([DecodeConfig(), DecodeConfig(window=4)], ["retro-w4"] * 2),  # which decode alike
        ([DecodeConfig(), DecodeConfig(revised_layers=0.5)], ["retro-w4", "retro-w4-revised0.5"]),
        (
            [preset("quest"), preset("paper", **TOKENS), preset("mean-key", page_size=8)],
            ["preset quest", "preset paper-w4-b128", "preset mean-key-p8"],
        ),
        ([preset("mean-key", method="retro", window=2)], ["retro-w2-mass-mean_key-mean_key_int8-traffic"]),
        ([QUEST, DecodeConfig("quest", dense_layers=0)], ["quest", "quest-dense_layers=0"]),
        ([DecodeConfig("quest", dense_layers=0)] * 2, ["quest"] * 2),  # there is nothing to tell apart
        ([DecodeConfig("full"), DecodeConfig("quest", dense_layers=0)], ["full", "quest"]),
        ([QUEST, DecodeConfig("quest", budget_floor=64)], ["quest", "quest-budget_floor=64"]),
        (
            [DecodeConfig("quest", **TOKENS), DecodeConfig("quest", budget_floor=64, **TOKENS)],
            ["quest-b128"] * 2,  # the floor decides nothing
        ),
    ],
)
def test_what_differs_is_named(configs, names):
    assert distinct_names(configs) == names


def test_what_stands_elsewhere_is_not_named():
    configs = [DecodeConfig("quest", **TOKENS), QUEST, DecodeConfig("quest", prefill_chunk=64)]
    told = ("budget", "budget_tokens", "prefill_chunk")
    assert distinct_names(configs, told) == ["quest"] * 3
    assert distinct_names(configs) == ["quest-b128", "quest", "quest-prefill_chunk=64"]
