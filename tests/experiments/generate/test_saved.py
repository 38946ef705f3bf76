"""States that `generate` keeps and goes on from."""

import json
import shutil

import jax
import pytest

import retro_jax
from retro_jax import DecodeConfig, Sampling, generate, init_state, load_model, save_state
from retro_jax.experiments.generate.command import Generate
from retro_jax.experiments.generate.saved import made_with

CONFIG = ("--budget-tokens", 32, "--page-size", 8, "--window", 3)
DRAWN = (*CONFIG, "--temperature", 0.9, "--seed", 5)
WHOLE = ("texts", "tokens", "finished", "config", "sampling")


@pytest.fixture(scope="module")
def text(tiny_folder):
    return ("generate", tiny_folder, "--prompt", "the house")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("states") / "kept"


@pytest.fixture
def saved(text, kept, json_command):
    """The state after 16 drawn tokens."""
    if not kept.exists():
        json_command(*text, *DRAWN, "--max-new-tokens", 16, "--save-state", kept)
    return kept


def test_the_output_is_that_of_one_longer_run(text, saved, command, json_command, tiny_folder, tmp_path):
    arguments = ("generate", tiny_folder, "--state", saved, "--max-new-tokens", 9)
    whole = json_command(*text, *DRAWN, "--max-new-tokens", 25)
    assert len(whole["tokens"][0]) == 25
    again = json_command(*arguments, "--save-state", tmp_path / "later")
    assert {name: again[name] for name in WHOLE} == {name: whole[name] for name in WHOLE}
    status, out, err = command(*arguments)
    assert (status, out) == (0, whole["texts"][0] + "\n")
    assert err.startswith("[9 tokens in")
    assert made_with(tmp_path / "later") == made_with(saved)


def test_the_cache_grows_where_it_must(saved, failure, tiny_folder, monkeypatch):
    def load_state(*_, capacity):
        raise ValueError(f"capacity {capacity}")

    monkeypatch.setattr(retro_jax, "load_state", load_state)
    for tokens, capacity in ((9, 256), (300, 512)):
        asked = ("generate", tiny_folder, "--state", saved, "--max-new-tokens", tokens)
        assert f"capacity {capacity}" in failure(*asked)


def test_a_prompt_is_the_next_turn(text, saved, json_command, tiny_folder):
    turn = json_command("generate", tiny_folder, "--state", saved, "--prompt", " then", "--max-new-tokens", 2)
    assert len(turn["tokens"][0]) == 2 and turn["sampling"]["seed"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", 2), "with another model or configuration (window 3, not 2); give those that"),
        (("--page-size", 16, "--sink-pages", 0), "(page_size 8, not 16; sink_pages 1, not 0)"),
        (("--dtype", "float32"), "(dtype 'bfloat16', not 'float32')"),
        (("--capacity", 20), "the cache holds 20"),
        (("--max-new-tokens", 3000), "tiny has 2048"),
        (
            ("--prompt", "a", "--prompt", "b"),
            "has 1 sequences, 2 prompts were given; give one for each, or no",
        ),
        (("--chat",), "--state cannot be used to talk; pass --prompt with --chat"),
        (("--chat", "--prompt", "a"), "leave --chat and --preset out"),
        (("--preset", "quest"), "leave --chat and --preset out"),
        (("--out", "x"), "--state cannot be given with --prompts"),
        (("--verify", 2), "previous has tokens that were decoded without"),
    ],
)
def test_what_does_not_go_on(saved, failure, tiny_folder, flags, message):
    assert message in failure("generate", tiny_folder, "--state", saved, *flags)


def test_places(text, saved, failure, tiny_folder, tmp_path):
    assert "kept exists and is not overwritten" in failure(*text, "--save-state", saved)
    assert "there is no folder" in failure("generate", tiny_folder, "--state", tmp_path / "none")
    assert "it has no about/about.json" in failure("generate", tiny_folder, "--state", tiny_folder)
    assert "holds a state, not a model" in failure("generate", saved, "--prompt", "a")
    config, model = DecodeConfig("quest"), load_model(str(tiny_folder))
    save_state(model, init_state(model.config, config, 1, 64), tmp_path / "loop", config)
    assert "holds the state of a loop of one's own" in failure(
        "generate", tiny_folder, "--state", tmp_path / "loop"
    )


def test_keys_of_ones_own_are_gone_on_with(json_command, tiny_folder, tmp_path):
    model, config = load_model(str(tiny_folder)), DecodeConfig("full")
    drawn = {"sampling": Sampling(0.9), "keys": jax.random.split(jax.random.key(7), 1)}
    whole = generate(model, ["the house"], config, 12, **drawn).turns
    save_state(model, generate(model, ["the house"], config, 4, **drawn), tmp_path / "keyed")
    again = json_command("generate", tiny_folder, "--state", tmp_path / "keyed", "--max-new-tokens", 8)
    assert again["tokens"] == whole


def test_all_that_it_was_made_with_is_the_default(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "verified")
    file = folder / "about" / "about.json"
    about = json.loads(file.read_text())
    about["generation"]["verify"] = 3
    file.write_text(json.dumps(about))
    flags = Generate.defaults(["model", "--state", str(folder)])
    assert (flags.verify, flags.dtype, flags.preset) == (3, "bfloat16", None)
    assert (flags.config.window, flags.config.budget_tokens, flags.sampling.seed) == (3, 32, 5)
