import dataclasses
from pathlib import Path

import jax
import pytest

from retro_jax import models
from retro_jax.models.load import local_path
from retro_jax.models.names import nearest


def test_a_model_says_what_it_is_in_five_lines():
    model = models.load_model("random:tiny")
    lines = repr(model).splitlines()
    count = sum(weight.size for weight in jax.tree.leaves(model.params))
    assert len(lines) == 5
    assert lines[0] == "Model random:tiny" and "8 query heads and 2 KV heads of 16" in lines[2]
    assert "no tokenizer" in lines[3]
    assert lines[4] == f"  {count / 1e6:.1f} million weights in float32, {4 * count / 1e9:.2f} GB on cpu:0"
    shapes = dataclasses.replace(model, params=jax.eval_shape(lambda: model.params))
    assert repr(shapes).endswith("on no device")


@pytest.mark.parametrize("name", ["./org", "../org/name", "/no/such", "a/b/c", "org/", "~/no-such"])
def test_a_path_that_is_not_there_is_called_that(name):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*(org|such|c|name)"):
        models.load_model(name)


def test_other_files_are_no_models():
    with pytest.raises(ValueError, match=r"test_load\.py is a file and no \.gguf file"):
        models.load_model(str(Path(__file__)))


def test_names_without_a_home():
    with pytest.raises(FileNotFoundError, match="name '~nobody-of-this-name/m' in full"):
        local_path("~nobody-of-this-name/m")


def test_nearest_names():
    assert nearest("Quets", ["quest", "retro"]) == " (did you mean 'quest'?)"
    assert nearest("best", ["quest", "retro"]) == nearest(None, ["quest"]) == nearest("x", []) == ""
