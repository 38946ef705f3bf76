"""What flags and the sizes of a model tell is refused before the model is read and anything compiles."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

import retro_jax
from retro_jax.experiments.analyses.distances import DistancesFolder
from retro_jax.experiments.compare.folder import ComparisonFolder
from retro_jax.experiments.runs import run as runner
from retro_jax.models.formats import converted, huggingface_tokenizer

IDS = ("--token-ids", "ids.npy")
FEW = ("--tokens", 64, "--prompt-tokens", 8)
MORE = ("--tokens", 640, "--prompt-tokens", 8)
TEXT = ("--text", "text.txt")


@pytest.fixture
def unread(failure, monkeypatch, tmp_path):
    """Runs a command that must be refused without a model, in a folder of inputs."""

    def load_model(*_, **__):
        pytest.fail("the model was read")

    monkeypatch.setattr(retro_jax, "load_model", load_model)
    monkeypatch.setattr(runner, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.ones((2, 5000), np.int32))
    np.save("far.npy", np.full((1, 64), 512, np.int32))
    (tmp_path / "text.txt").write_text("a text\n")
    for name, line in {
        "text": {"prompt": "a"},
        "ids": {"prompt": [1, 2]},
        "far": {"prompt": [1, 512]},
        "chat": {"messages": [{"role": "user", "content": "a"}]},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    return failure


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (
            "bench decode",
            ("--contexts", 256, 4000, "--steps", 8, "--rounds", 6),
            "--contexts 4000 with --rounds 6 of --steps 8 and --scan take 4115 positions, random:tiny has "
            "4096; use --contexts 3981 at most",
        ),
        (
            "bench decode",
            ("--contexts", 10, "--steps", 1000, "--rounds", 6, "--no-scan"),
            "take 6013 positions, random:tiny has 4096; none would fit, so lower --rounds 6 of --steps 1000",
        ),
        (
            "bench decode",
            ("--contexts", 8, "--torch", "no/python"),
            "--torch no/python is no program that can be",
        ),
        (
            "bench throughput",
            ("--contexts", 4000),
            "--contexts 4000 with --reply-tokens 1024 take 5024 positions, random:tiny has 4096; use "
            "--contexts 3072 at most",
        ),
        (
            "bench throughput",
            ("--prompt-tokens", 8, 4000, "--reply-tokens", 8, 90, "--verify", 8, "--methods", "quest"),
            "--prompt-tokens 4000 with --reply-tokens 90 and --verify 8 take 4098 positions",
        ),
        ("bench verify", ("--context", 4000), "use --context 3"),
        (
            "score",
            (*IDS, "--tokens", 4999),
            "--tokens 4999 take 4999 positions, random:tiny has 4096; use --tok",
        ),
        ("compare", (*IDS, "--tokens", "None"), "--tokens 5000 take 5000 positions, random:tiny has 4096"),
        ("overlap", (*IDS, "--tokens", 4999), "use --tokens 4096 at most"),
        ("distances", (*IDS, "--tokens", 4999, "--out", "out"), "use --tokens 4096 at most"),
        (
            "generate",
            IDS,
            "take 5256 positions, random:tiny has 4096; none would fit, so lower 5000 tokens before",
        ),
        (
            "generate",
            ("--chat", "--max-new-tokens", 4096),
            "random:tiny has no tokenizer, so it cannot chat; use another model",
        ),
        (
            "generate",
            ("--prompts", "ids.jsonl", "--out", "out", "--max-new-tokens", 4095),
            "prompt 1 and its new",
        ),
        ("generate", ("--prompts", "ids.jsonl", "--out", "out", "--capacity", 9), "the cache holds 9"),
        ("generate", ("--prompts", "ids.jsonl", "--out", "out", "--capacity", 5000), "--capacity 5000 take"),
        pytest.param(
            "eval",
            ("--tasks", "hellaswag"),
            "random:tiny has no tokenizer, so it cannot read tasks",
            marks=pytest.mark.skipif(not find_spec("lm_eval"), reason="needs lm-eval"),
        ),
        (
            "generate",
            ("--prompt", "abc"),
            "random:tiny has no tokenizer, so it cannot read text; pass --token-ids",
        ),
        (
            "generate",
            ("--prompts", "text.jsonl", "--out", "out"),
            "has no tokenizer; give prompt 1 as token ids",
        ),
        ("generate", ("--prompts", "chat.jsonl", "--out", "out"), "has no tokenizer, so it cannot chat"),
        ("score", TEXT, "random:tiny has no tokenizer, so it cannot read text; pass --token-ids FILE.npy"),
        ("compare", TEXT, "random:tiny has no tokenizer, so it cannot read text; pass --token-ids FILE.npy"),
        ("overlap", TEXT, "random:tiny has no tokenizer, so it cannot read text; pass --token-ids FILE.npy"),
        ("distances", (*TEXT, "--out", "out"), "random:tiny has no tokenizer, so it cannot read text"),
        (
            "learn",
            (*TEXT, "--out", "out"),
            "random:tiny has no tokenizer, so it cannot read text; use another",
        ),
        ("bench verify", TEXT, "random:tiny has no tokenizer; leave --text out, for random tokens"),
        ("bench throughput", TEXT, "random:tiny has no tokenizer; leave --text out, for random tokens"),
        (
            "score",
            ("--token-ids", "far.npy", *FEW),
            "far.npy has token id 512, outside the vocabulary of random:tiny",
        ),
        ("generate", ("--token-ids", "far.npy"), "prompt 0 has token id 512, outside the vocabulary"),
        (
            "generate",
            ("--prompts", "far.jsonl", "--out", "out"),
            "prompt 1 has token id 512, outside the vocabulary",
        ),
        ("score", (*IDS, "--tokens", 6000), "ids.npy has 5000 tokens, fewer than the 6000 asked for"),
        ("score", (*IDS, "--tokens", 64), "--prompt-tokens is 1024; it must be in 1..63 for 64 tokens"),
    ],
)
def test_what_flags_and_sizes_tell_needs_no_model(unread, words, flags, message):
    assert message in unread(*words.split(), "random:tiny", *flags)


def test_a_later_model_of_a_study_is_refused_before_the_first_is_read(unread, tiny_folder, tmp_path):
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "text.txt").write_text("a text\n")
    names = ("--models", tiny_folder, "random:tiny", "--domains", "prose", "--out", "out")
    line = unread("study", *names, "--only", "Quest", "--tokens", 600, "--prompt-tokens", 100)
    assert "random:tiny has no tokenizer, so it cannot read text; give a .npy file of token ids" in line


def test_a_run_needs_a_tokenizer(unread):
    line = unread("run", "smollm2-recall", "--model", "random:tiny", "--task.count", 1, "--out", "out")
    assert "random:tiny has no tokenizer, which tasks need" in line


def test_folders_tell_whether_they_have_a_tokenizer(unread, tiny_folder, tmp_path):
    assert huggingface_tokenizer.has_tokenizer(tiny_folder)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert "has no tokenizer, so it cannot read text" in unread("generate", tmp_path, "--prompt", "abc")


@pytest.mark.parametrize("with_tokenizer", (False, True))
def test_converted_folders_tell_it_too(tiny_folder, tmp_path, with_tokenizer):
    model = retro_jax.load_model(str(tiny_folder))
    if not with_tokenizer:
        model = retro_jax.Model(model.config, model.params, None)
    converted.save_model(model, tmp_path / "converted")
    assert converted.converted_tokenizer(tmp_path / "converted") == with_tokenizer


@pytest.mark.parametrize(("words", "kind"), [("compare", ComparisonFolder), ("distances", DistancesFolder)])
def test_a_folder_of_other_settings_is_refused_before_the_model_is_read(unread, tmp_path, words, kind):
    other = {"model": "random:tiny", "prompt_tokens": 9, "token_ids": "0", "dtype": "float32"}
    kind(tmp_path / "out", other).begin()
    line = unread(words, "random:tiny", *IDS, *MORE, "--out", "out")
    assert f"out holds another {kind.kind} (prompt_tokens 9, not 8; token_ids '0', not '" in line
    assert "choose another --out" in line and "dtype" not in line  # the model's own is not known yet


@pytest.mark.parametrize("words", ("score", "compare", "overlap", "distances --out out"))
def test_ranges_of_no_tokens_are_refused(unread, words):
    line = unread(*words.split(), "random:tiny", *IDS, *MORE, "--bin-tokens", -4)
    assert "--bin-tokens is -4; it must be 1 or more" in line
