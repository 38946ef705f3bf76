"""How programs over several devices are compiled: settings of XLA for GPUs of one process, none elsewhere."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import retro_jax as rj
from retro_jax import compilation
from retro_jax.compilation import SEVERAL_GPUS, JitForMesh


def devices(platform, processes):
    """Devices, as far as they are asked."""
    return [SimpleNamespace(platform=platform, process_index=process) for process in processes]


@pytest.mark.parametrize(
    ("found", "flags", "given"),
    (
        (devices("gpu", [0, 0]), "--xla_dump_to=/tmp", True),
        (devices("gpu", [0]), "", False),
        (devices("gpu", [0, 1]), "", False),
        (devices("cpu", [0, 0]), "", False),
        (devices("tpu", [0, 0]), "", False),
        (devices("gpu", [0, 0]), "--xla_gpu_enable_command_buffer=", False),
    ),
)
def test_gpus_of_one_process_get_settings_unless_the_user_has_set_them(monkeypatch, found, flags, given):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(compilation, "_known_to_xla", lambda _: True)
    assert compilation._options_of(found) == (SEVERAL_GPUS if given else {})


def test_settings_that_xla_does_not_know_are_left_out_with_a_warning(monkeypatch, caplog):
    device = jax.devices()[0]
    compilation._known_to_xla.cache_clear()
    assert compilation._known_to_xla(device)  # all of XLA's compilers know the names
    compilation._known_to_xla.cache_clear()
    monkeypatch.setattr(compilation, "SEVERAL_GPUS", {"xla_gpu_of_another_release": "1"})
    with caplog.at_level(logging.WARNING):
        assert not compilation._known_to_xla(device)
    assert "several GPUs may be slow: XLA says" in caplog.text
    compilation._known_to_xla.cache_clear()


def test_a_function_is_compiled_with_the_options_of_the_mesh_that_is_set(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation, "compiler_options", lambda mesh: asked.append(mesh.size) or {})
    double = JitForMesh(lambda x, by: x * by, static_argnames="by")
    assert double(jnp.ones(2), by=2).tolist() == [2.0, 2.0]
    with jax.set_mesh(rj.make_mesh(1, 2)):
        double(jnp.ones(2), by=2)
    assert asked == [2]
    assert double._cache_size() == 2
