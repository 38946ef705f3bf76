import json
from dataclasses import replace

import numpy as np
import pytest

from retro_jax.experiments.bench.verify import BenchVerify, FullRun
from retro_jax.experiments.bench.verify_report import acceptance_table, predicted, prediction_table

SHORT = ("--batch", 2, "--context", 40, "--own-tokens", 4, "--new-tokens", 6, "--drafts", 2, "--calls", 1)
DRAFT = ("--budgets", 32, "--dense-layers", 0)


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


@pytest.mark.parametrize(
    ("acceptance", "drafts", "tokens"), ((1.0, 4, 5), (0.0, 4, 1), (0.5, 2, 1.75), (0.9, 1, 1.9))
)
def test_a_round_yields_one_token_and_those_accepted_one_after_another(acceptance, drafts, tokens):
    rate = predicted(acceptance, drafts, batch=8, draft_step_ms=2.0, check_ms=10.0)
    assert rate == pytest.approx(8 * tokens / (drafts * 2.0 + 10.0) * 1e3)


def test_predictions_are_told_beside_full_attention():
    part = {"name": "quest", "budget": 0.05, "drafts": 4, "draft_step_ms": 2.0, "check_ms": 12.0}
    _, _, row = cells(prediction_table([part], (0.0, 1.0), batch=2, full_tokens_per_s=250.0))
    assert row == ["quest", "0.05", "4", "2.00", "12.00", "100 (0.40)", "500 (2.00)"]


def test_acceptance_of_different_numbers_of_drafts():
    rows = [
        {"name": "quest", "budget": 0.05, "drafts": 1, "adapted": False, "acceptance": [0.875]},
        {"name": "quest", "budget": 256, "drafts": 2, "adapted": True, "acceptance": [0.9, 0.5]},
    ]
    head, _, one, two = cells(acceptance_table(rows))
    assert head == ["", "1", "2"]
    assert one == ["quest, 0.05, 1", "0.88", ""]
    assert two == ["quest, 256, up to 2", "0.90", "0.50"]


def test_where_texts_part():
    run = FullRun(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[9.0, 8, 7], [6, 0.5, 4]]), 1.0, 1.0)
    assert run.parted([[1, 2, 3, 7], [4, 6]]) == [{"sequence": 1, "after": 1, "gap": 0.5}]
    assert run.parted([[1], [4, 5, 6]]) == []


def test_a_setting_of_some_methods_is_for_these_and_named():
    bench = BenchVerify(model="m", methods=("quest", "retro"), presets=("paper",), budgets=(64, 0.15))
    common = replace(bench.config, dense_layers=0, revised_layers=0.5)
    found = replace(bench, config=common).configurations()
    assert {name: [own.revised_layers for own in configs] for name, configs in found.items()} == {
        "quest": [1.0, 1.0],
        "retro-w4-revised0.5": [0.5, 0.5],
        "preset paper-w4-revised0.5": [0.5, 0.5],
    }
    assert [(own.budget_tokens, own.budget) for own in found["quest"]] == [(64, 0.15), (None, 0.15)]


def test_bench_verify(json_command, failure, tmp_path):
    out = tmp_path / "more" / "verify"
    values = json_command("bench", "verify", "random:tiny", *SHORT, *DRAFT, "--out", out)
    assert values == json.loads((out / "results.json").read_text())
    (row,), (part,) = values["rows"], values["parts"]
    token = 4 * 2 * (2 * 16 * 4)  # 4 layers, keys and values of 2 KV heads of 16 channels, float32
    assert values["full"]["kv_bytes"] == (40 + 4 + 16) * token
    assert 44 * token < row["check_bytes_per_check"] < 60 * token
    assert 0 < row["draft_bytes_per_check"] < 2 * 60 * token  # of two steps
    assert row["drafts_per_check"] == 2
    assert row["tokens_per_check"] == pytest.approx(1 + sum(row["acceptance"])) and row["same_sequences"] == 2
    # Two sparse steps and the check of three rows read the weights as often; full attention once a token.
    rounds = 3 * values["weight_bytes"] + 2 * (row["draft_bytes_per_check"] + row["check_bytes_per_check"])
    full = values["weight_bytes"] + 2 * values["full"]["kv_bytes"]
    assert row["over_full_by_bytes"] == pytest.approx(row["tokens_per_check"] * full / rounds)
    assert min(part["draft_step_ms"], part["check_ms"], row["round_ms"], *row["seconds"]) > 0
    report = (out / "table.md").read_text()
    assert "random:tiny (float32), 2 x 44 tokens on cpu" in report and "| quest" in report
    assert values["provenance"]["command"]
    line = failure("bench", "verify", "random:tiny", *SHORT, "--out", out)
    assert "is not overwritten" in line


def test_bench_verify_predicts_without_reading_a_context(json_command):
    values = json_command("bench", "verify", "random:tiny", *SHORT, *DRAFT, "--predict")
    assert values["rows"] == []
    assert values["full"]["kv_bytes"] == (40 + 4 + 16) * 4 * 2 * (2 * 16 * 4)  # as if read
    assert min(values["parts"][0][name] for name in ("draft_step_ms", "check_ms")) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--methods", "full"), "method 'full', whose drafts would read as much"),
        (("--methods", "h2o"), "method 'h2o', evict None, which evicts"),
        (("--methods",), "nothing that drafts; name --methods or --presets"),
        (("--drafts", 0), "verify 0 is below 1"),
        (("--drafts",), "--drafts needs at least one value"),
        (("--acceptances", 1.5), "--acceptances has 1.5; it must be in 0..1"),
        (("--own-tokens", 0), "--own-tokens is 0; it must be 1 or more"),
        (("--rectify-every", 4), "rectify_every 4, but every check leaves an exact cache"),
        (("--text", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--text", __file__), "random:tiny has no tokenizer; leave --text out"),
        (("--context", 4090), "take 4138 positions, random:tiny has 4096; use --context 4048 at most"),
    ),
)
def test_bench_verify_refuses(failure, flags, message):
    assert message in failure("bench", "verify", "random:tiny", *SHORT[4:], *flags)


def test_the_cache_has_room_for_what_is_timed_and_decoded():
    command = BenchVerify(model="m", context=100, own_tokens=10, new_tokens=50, drafts=(2, 8), calls=1)
    assert command.capacity == 110 + 100 + 4 * 9  # the fastest sequences go on for the slowest
    command = BenchVerify(model="m", context=100, own_tokens=10, new_tokens=1, drafts=(2,), calls=9)
    assert command.capacity == 110 + 10 * 16 + 4 * 3
