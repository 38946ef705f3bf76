"""The documentation: links have targets, public names have a page, and what it shows does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import jax
import pytest

import pallas_kernels
import retro_jax as rj
from pallas_kernels import SCORES, STATISTICS
from retro_jax import models
from retro_jax.experiments.cli import COMMANDS, Group, _read
from retro_jax.experiments.generate import saved
from retro_jax.methods import METHODS
from tests.models.byte_tokenizer import byte_backend

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "how-to").glob("*.md"))]
MODEL = models.ModelConfig(
    name="tiny",
    vocab_size=259,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    width=16,
    hidden_width=16,
    max_positions=2048,
)
DEVICES = {"make_mesh(1, 4)": "make_mesh(1, 1)"}
"""A snippet for more devices than there are runs on one."""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def with_blocks(language):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def reader():
    """A random model that can read text, in the place of every model that a snippet names."""
    return rj.Model(MODEL, models.random_params(MODEL, jax.random.key(0)), models.Tokenizer(byte_backend()))


def test_every_command_and_every_how_to_is_listed():
    table = (DOCS / "reference" / "command-line.md").read_text().split("\n## ")[0]
    words = {
        word
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for word in re.findall(r"[\w-]+", row)
    }
    groups = {name for name, entry in COMMANDS.items() if isinstance(entry, Group)}
    assert words == {*COMMANDS, *COMMANDS["bench"].entries(), "NAME"} and groups == {"bench", "run"}
    index = (DOCS / "index.md").read_text()
    pages = {page.name for page in (DOCS / "how-to").glob("*.md")}
    assert set(re.findall(r"how-to/([\w-]+\.md)", index)) == pages


@pytest.mark.parametrize("page", with_blocks("python"))
def test_snippets_run(page, reader, monkeypatch, tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")  # the README's reads a text of the checkout
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rj, "load_model", lambda *_, **__: reader, raising=False)
    namespace = {}
    with patch.dict(METHODS), patch.dict(SCORES), patch.dict(STATISTICS):
        for code in blocks(page, "python"):
            for shown, here in DEVICES.items():
                code = code.replace(shown, here)
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_are_understood(page, monkeypatch):
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    ours = [words[1:] for words in commands if words and words[0].split("/")[-1] == "retro-jax"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(saved, "made_with", lambda folder: {})  # no state is there
    for words in ours:
        if words != ["--version"]:
            _read(words)


def test_every_public_name_has_one_page():
    shown = re.findall(r"^::: (\S+)", "".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.M)
    assert len(shown) == len(set(shown))
    names = [name.split(".")[-1] for name in shown]
    elsewhere = {"retro_jax": {"Model", "load_model"}, "pallas_kernels": set(), "retro_jax.models": set()}
    for package in (rj, pallas_kernels, models):
        missing = {name for name in package.__all__ if name not in names} - elsewhere[package.__name__]
        assert not missing, f"{package.__name__}: {missing} have no page"


def build(config, out):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_site_builds(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generate_many" in (tmp_path / "reference" / "decoding.html").read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nowhere"])
def test_a_link_without_a_target_fails(tmp_path, link):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"[there]({link})\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: docs\nnav: [index.md]\nplugins: []\n")
    done = build(config, tmp_path / "site")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
