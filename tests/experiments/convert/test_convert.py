import numpy as np
import pytest

from retro_jax import load_model

FLAGS = ("--tokens", 40, "--prompt-tokens", 32, "--budget-tokens", 32, "--page-size", 8)


def test_a_converted_folder_is_taken_as_a_model(json_command, command, failure, tiny_folder, tmp_path):
    folder = tmp_path / "converted"
    values = json_command("convert", tiny_folder, folder)
    weights = load_model(str(tiny_folder)).params
    assert (
        values["bytes"]
        == sum(np.asarray(leaf).nbytes for leaf in [weights.embed, weights.head])
        + sum(value.nbytes for layer in weights.layers for value in vars(layer).values() if value is not None)
        + weights.final_norm.nbytes
    )
    np.save(tmp_path / "ids.npy", np.arange(40))
    text = ("--token-ids", tmp_path / "ids.npy", *FLAGS)
    assert json_command("score", folder, *text)["nll"] == json_command("score", tiny_folder, *text)["nll"]
    assert "converted exists and is not overwritten; choose another folder" in failure(
        "convert", tiny_folder, folder
    )
    status, out, _ = command("convert", folder, tmp_path / "rounded", "--dtype", "bfloat16")
    assert (status, out) == (0, f"{tmp_path / 'rounded'}: 0.00 GB of weights in bfloat16\n")
    assert load_model(str(tmp_path / "rounded")).config.dtype == "bfloat16"


@pytest.mark.parametrize(("model", "message"), [("random:huge", "'huge'"), ("no/such/folder", "no folder")])
def test_what_cannot_be_read(failure, tmp_path, model, message):
    assert message in failure("convert", model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(failure, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file, so" in failure("convert", "random:tiny", tmp_path / "file" / "new")
