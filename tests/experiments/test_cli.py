import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

import retro_jax
from retro_jax import DecodeConfig, preset
from retro_jax.experiments.cli import main

FAST = ("--budget-tokens", 32, "--page-size", 8, "--window", 2)
SCORED = ("--tokens", 96, "--prompt-tokens", 24, "--budget-tokens", 32, "--page-size", 8)
TEXT = (*SCORED, "--window", 2)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in DecodeConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
    assert "serves only" not in text


@pytest.mark.parametrize(
    "name", ["generate", "score", "compare", "overlap", "bench decode", "bench kernels", "run smollm2-recall"]
)
def test_help_has_text_for_every_flag(capsys, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    flags = [(line, after) for line, after in itertools.pairwise(lines) if line.startswith("--")]
    assert len(flags) > 10
    for line, after in flags:
        words = line.split("  ", 1)[1] if "  " in line else after
        assert not words.lstrip().startswith("(default"), f"{line} has no help text"


def test_generate_from_token_ids(json_command, ids_file):
    arguments = ("--token-ids", ids_file, "--max-new-tokens", 5, *FAST)
    values = json_command("generate", "random:tiny", *arguments)
    assert [len(tokens) for tokens in values["tokens"]] == [5, 5]
    assert values["finished"] == [False, False]
    assert values["config"]["budget_tokens"] == 32
    assert 0.0 < values["compile_seconds"] < values["seconds"]
    again = json_command("generate", "random:tiny", *arguments, "--temperature", 1.0, "--seed", 3)
    assert again["sampling"]["seed"] == 3
    assert again["tokens"] != values["tokens"]


def test_generate_verifies(command, json_command, ids_file):
    arguments = ("generate", "random:tiny", "--token-ids", ids_file, "--max-new-tokens", 9, "--page-size", 8)
    drafts = ("--method", "quest", "--budget-tokens", 32, "--verify", 2)
    values = json_command(*arguments, *drafts)
    assert values["tokens"] == json_command(*arguments, "--method", "full")["tokens"]
    metrics = values["metrics"]
    assert metrics["checks"] * metrics["tokens_per_check"] == pytest.approx(2 * 8)  # the prompts gave two
    assert 1 <= len(metrics["acceptance"]) <= 2
    err = command(*arguments, *drafts)[2]
    accepted = " ".join(f"{share:.2f}" for share in metrics["acceptance"])
    assert f"{metrics['tokens_per_check']:.2f} tokens per check" in err
    assert f"accepted, by position: {accepted}" in err


def test_generated_ids_are_printed_where_there_is_no_text(command, ids_file, json_command):
    arguments = ("generate", "random:tiny", "--token-ids", ids_file, "--max-new-tokens", 5, *FAST)
    tokens = json_command(*arguments)["tokens"]
    _, out, err = command(*arguments)
    assert out == "".join(f"--- {n} ---\n{' '.join(map(str, row))}\n" for n, row in enumerate(tokens, 1))
    assert "10 tokens in" in err
    assert "MB of KV cache read per token" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", -1), "temperature -1.0 is below 0"),
        (("--max-new-tokens", 0), "max_new_tokens 0"),
        (("--verify", 0), "verify 0 is below 1; use None for no verification"),
        (("--verify", 2, "--evict", "h2o", "--cache-tokens", 64), "evicts pages that the check needs"),
        (("--max-new-tokens", 5000), "take 5096 positions, random:tiny has 4096"),
        (("--capacity", 50), "the cache holds 50"),
    ],
)
def test_generate_refuses(failure, ids_file, flags, message):
    assert message in failure("generate", "random:tiny", "--token-ids", ids_file, *FAST, *flags)


def test_generate_needs_a_tokenizer_for_text(failure):
    line = failure("generate", "random:tiny", "--prompt", "Hello", *FAST)
    assert "random:tiny has no tokenizer" in line


def test_generate_needs_a_prompt(failure):
    assert (
        "pass --prompt TEXT, --prompt-file FILE, --token-ids FILE.npy, --prompts FILE.jsonl or --chat"
        in failure("generate", "random:tiny")
    )


def test_chat_needs_a_tokenizer(failure):
    assert "so it cannot chat" in failure("generate", "random:tiny", "--chat")


def test_score(json_command, ids_file):
    flags = (*SCORED, "--method", "quest")
    values = json_command("score", "random:tiny", "--token-ids", ids_file, *flags)
    assert values["config"]["method"] == "quest"
    assert values["nll"]["mean"] == pytest.approx(np.mean(list(values["texts"].values())))
    assert values["perplexity"] == pytest.approx(np.exp(values["nll"]["mean"]))
    assert 4.0 < values["nll"]["mean"] < 9.0  # log(512) is 6.2
    assert values["metrics"]["pages_loaded"] == pytest.approx(4.0)  # 32 tokens in pages of 8
    assert values["provenance"]["versions"]["jax"]


def test_a_preset_gives_the_defaults_that_flags_change(json_command, ids_file):
    flags = ("--token-ids", ids_file, "--tokens", 40, "--prompt-tokens", 36, "--budget-tokens", 64)
    values = json_command("score", "random:tiny", *flags, "--preset", "mean-key", "--page-size", 8)["config"]
    assert values == json.loads(json.dumps(asdict(preset("mean-key", budget_tokens=64, page_size=8))))
    plain = json_command("score", "random:tiny", *flags)["config"]
    assert plain == json.loads(json.dumps(asdict(DecodeConfig(budget_tokens=64))))


def test_score_prints_a_table(command, ids_file):
    status, out, _ = command("score", "random:tiny", "--token-ids", ids_file, *TEXT, "--bin-tokens", 36)
    assert status == 0
    assert [line.split("|")[1].strip() for line in out.splitlines()] == [
        "text",
        "------",
        "ids[0]",
        "ids[1]",
        "all",
    ]
    assert "24-59" in out
    assert "60-95" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 97, "--prompt-tokens", 24), "has 96 tokens, fewer than the 97 asked for"),
        (("--tokens", 96, "--prompt-tokens", 96), "--prompt-tokens is 96; it must be in 1..95"),
        (("--tokens", 0), "--tokens is 0"),
        ((*TEXT, "--method", "best"), "method 'best' is unknown; use one of full, quest, retro"),
        ((*TEXT, "--window", 0), "window 0 is below 1"),
        ((*TEXT, "--budget-tokens", 8), "budget_tokens 8 is below the 2 pages"),
        ((*TEXT, "--text", "some.txt"), "pass either --text"),
    ],
)
def test_score_refuses(failure, ids_file, arguments, message):
    assert message in failure("score", "random:tiny", "--token-ids", ids_file, *arguments)


def test_unknown_model(failure, ids_file):
    line = failure("score", "random:huge", "--token-ids", ids_file, *TEXT)
    assert "'huge'" in line
    assert "tiny" in line


def test_missing_file(failure, tmp_path):
    assert "there is no file" in failure("score", "random:tiny", "--token-ids", tmp_path / "no.npy", *TEXT)


def test_token_outside_the_vocabulary(failure, tmp_path):
    np.save(tmp_path / "ids.npy", np.full(96, 512))
    line = failure("score", "random:tiny", "--token-ids", tmp_path / "ids.npy", *TEXT)
    assert "token id 512" in line
    assert "0..511" in line


def test_traceback_shows_where(ids_file):
    with pytest.raises(ValueError, match="method 'best' is unknown"):
        main(["score", "random:tiny", "--token-ids", str(ids_file), "--method", "best", "--traceback"])


def test_interrupted(monkeypatch, command, ids_file):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(retro_jax, "score", stop)
    status, out, err = command("score", "random:tiny", "--token-ids", ids_file, *TEXT)
    assert (status, out) == (130, "")
    assert "stopped" in err


def test_json_is_all_of_stdout(command, ids_file, tmp_path):
    sweep = ("--windows", 1, "--budgets", 32, "--page-sizes", 8)
    arguments = ("--tokens", 96, "--prompt-tokens", 24, *sweep, "--out", tmp_path / "out")
    status, out, _ = command("compare", "random:tiny", "--token-ids", ids_file, *arguments, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())
