"""What compiled programs leave behind."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from retro_jax.experiments.machine import programs
from retro_jax.experiments.tpu import compiler as tpu_compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """JAX's persistent compilation cache in a folder of its own, which takes every program."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_that_are_not_to_be_cached_are_not_and_others_are(cache):
    x = np.arange(3.0)
    with programs.not_cached():
        jax.jit(lambda x: x * 2 + 1)(x)
    assert not list(cache.iterdir())
    jax.jit(lambda x: x * 3 + 1)(x)
    assert list(cache.iterdir())


@pytest.mark.skipif(not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test")
def test_programs_for_a_device_that_is_not_here_are_not_cached(cache):
    executable = tpu_compiler.compile_for("v5e", jnp.sin, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert "sine" in executable.as_text()
    assert not list(cache.iterdir())


@pytest.mark.parametrize(("used", "dropped"), [(24, False), (25, True)])
def test_programs_are_dropped_once_they_take_a_quarter_of_the_maps(used, dropped, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(programs, "MAPS_LIMIT", tmp_path / "limit")
    programs.MAPS.write_text("7f00-7f01 r-xp 00000000 00:00 0\n" * used)
    programs.MAPS_LIMIT.write_text("100\n")
    traces = []

    @jax.jit
    def traced(x):
        traces.append(x)
        return x + 1

    traced(1.0)
    assert programs.release() is dropped
    traced(1.0)
    assert len(traces) == 1 + dropped


def test_a_dropped_program_gives_its_maps_back():
    if not programs.MAPS.exists():
        pytest.skip("only Linux tells the number of maps")

    def maps():
        return programs.MAPS.read_bytes().count(b"\n")

    def maps_at_rest():  # they go as soon as a thread of XLA lets go of a program
        last = None
        while (number := maps()) != last:
            last = number
            time.sleep(0.3)
        return number

    # As outside the tests: code split into parts, each with maps of its own.
    split = {"xla_cpu_parallel_codegen_split_count": 32}
    x = jnp.ones((64, 64))
    program = jax.jit(lambda x: sum(jnp.sin(x * k) @ x for k in range(20)), compiler_options=split)
    jax.clear_caches()
    before = maps_at_rest()
    jax.block_until_ready(program(x))
    assert maps_at_rest() > before + 20
    assert programs.release(share=0.0)
    assert maps_at_rest() < before + 20


def test_where_the_system_tells_no_number_of_maps_nothing_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAPS", tmp_path / "none")
    assert not programs.release(share=0.0)
