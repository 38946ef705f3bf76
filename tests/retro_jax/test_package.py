import graphlib
import importlib
from importlib.metadata import version

import grimp
import pytest

import retro_jax


def test_every_name_is_found_where_the_table_says():
    assert sorted(retro_jax._MODULES) == sorted(retro_jax.__all__)
    for name in retro_jax.__all__:
        assert getattr(retro_jax, name) is getattr(importlib.import_module(retro_jax._MODULES[name]), name)
    assert {"__version__", "generate", "preset"} <= set(dir(retro_jax))
    assert retro_jax.__version__ == version("retro-jax")


@pytest.mark.parametrize("name", ["decode", "generate", "prefill", "score"])
def test_a_submodule_does_not_hide_the_function_of_its_name(name, monkeypatch):
    monkeypatch.delattr(retro_jax, name, raising=False)
    setattr(retro_jax, name, importlib.import_module(f"retro_jax.{name}"))  # as an import does
    assert callable(getattr(retro_jax, name))


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        retro_jax.generat  # noqa: B018


def test_no_file_imports_one_that_imports_it():
    graph = grimp.build_graph("retro_jax", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert "retro_jax.config" in imports["retro_jax.step"]
    own = {name: found for name, found in imports.items() if not name.startswith("retro_jax.experiments")}
    list(graphlib.TopologicalSorter(own).static_order())  # raises CycleError
