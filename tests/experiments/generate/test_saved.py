"""States that `generate` keeps and goes on from."""

import numpy as np
import pytest

from retro_jax import DecodeConfig, init_state, load_model, save_state

CONFIG = ("--budget-tokens", 32, "--page-size", 8, "--window", 3)
DRAWN = (*CONFIG, "--temperature", 0.9, "--seed", 5)
WHOLE = ("texts", "tokens", "finished", "config", "sampling")


@pytest.fixture(scope="module")
def text(tiny_folder):
    return ("generate", tiny_folder, "--prompt", "Once upon a time there was a house by the sea, and in it")


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
    later = json_command("generate", tiny_folder, "--state", tmp_path / "later", "--max-new-tokens", 300)
    assert later["tokens"][0][:25] == whole["tokens"][0]  # in a longer cache
    assert len(later["tokens"][0]) == 325 or later["finished"] == [True]


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
    assert "weights of 'tiny', not those" not in failure("generate", "random:tiny", "--state", saved)
    config = DecodeConfig("quest")
    model = load_model("random:tiny")
    save_state(model, init_state(model.config, config, 1, 64), tmp_path / "loop", config)
    assert "holds the state of a loop of one's own" in failure(
        "generate", "random:tiny", "--state", tmp_path / "loop"
    )


def test_verified_text_goes_on_verified(tiny_folder, json_command, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(60) % 40 + 10)
    arguments = ("generate", tiny_folder, "--token-ids", tmp_path / "ids.npy")
    drafts = ("--method", "quest", "--budget-tokens", 32, "--page-size", 8, "--verify", 2)
    whole = json_command(*arguments, *drafts, "--max-new-tokens", 12)
    json_command(*arguments, *drafts, "--max-new-tokens", 6, "--save-state", tmp_path / "state")
    again = json_command("generate", tiny_folder, "--state", tmp_path / "state", "--max-new-tokens", 6)
    assert again["tokens"] == whole["tokens"] and again["verify"] == 2 and "checks" in again["metrics"]
