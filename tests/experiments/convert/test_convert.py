import jax
import numpy as np
import pytest

from retro_jax import load_model


def test_a_converted_folder_is_taken_as_a_model(json_command, command, failure, tiny_folder, tmp_path):
    folder = tmp_path / "converted"
    values = json_command("convert", tiny_folder, folder)
    weights, source = jax.tree.leaves(load_model(str(folder)).params), load_model(str(tiny_folder)).params
    for one, other in zip(weights, jax.tree.leaves(source), strict=True):
        np.testing.assert_array_equal(one, other)
    assert values["bytes"] == sum(weight.nbytes for weight in weights) > 0
    assert "converted exists and is not overwritten; choose another folder" in failure(
        "convert", tiny_folder, folder
    )
    status, out, _ = command("convert", folder, tmp_path / "wide", "--dtype", "float32")
    assert (status, out) == (0, f"{tmp_path / 'wide'}: 0.00 GB of weights in float32\n")
    assert load_model(str(tmp_path / "wide")).config.dtype == "float32"


@pytest.mark.parametrize(("model", "message"), [("random:huge", "'huge'"), ("no/such/folder", "no folder")])
def test_what_cannot_be_read(failure, tmp_path, model, message):
    assert message in failure("convert", model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(failure, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file, so" in failure("convert", "random:tiny", tmp_path / "file" / "new")


def test_a_learned_score_is_not_converted(failure, tmp_path):
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "score.json").write_text(
        '{"format": 1, "model": {}, "name": "", "page_size": 8, "channels": 8, "weights": ""}'
    )
    message = failure("convert", "random:tiny", tmp_path / "new", "--learned", tmp_path / "score")
    assert "leave --learned out" in message
