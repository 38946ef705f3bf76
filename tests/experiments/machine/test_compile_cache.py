import jax
import pytest

from retro_jax.experiments.machine.compile_cache import MAX_BYTES, keep_programs


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """JAX's settings as if nothing had been set, and a cache folder of the test's own."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("RETRO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    for name, value in zip(names, (None, True, -1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_beside_the_models(tmp_path, capsys):
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES
    assert capsys.readouterr() == ("", "")


def test_jaxs_own_settings_come_first(tmp_path):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    keep_programs()
    assert jax.config.jax_compilation_cache_dir is None and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert (
        out == "" and err.startswith("retro-jax: compiled programs are not kept: ") and err.count("\n") == 1
    )
