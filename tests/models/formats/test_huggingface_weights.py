"""Weights that contradict config.json, each other, or are no numbers by themselves."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax import models
from tests.models import golden

TIED = golden.FOLDER / "qwen2"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def rewrite(tmp_path):
    """Copies a tied model with its weights changed."""

    def write(change):
        folder = shutil.copytree(TIED, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        return folder

    return write


def test_an_equal_copy_of_a_tied_head(rewrite, caplog):
    model = models.load_model(str(rewrite(lambda weights: weights.update({HEAD: weights[EMBED].copy()}))))
    assert model.params.head is None
    assert not caplog.records


def test_a_head_that_differs_from_the_tied_embedding_is_used(rewrite, caplog):
    folder = rewrite(lambda weights: weights.update({HEAD: weights[EMBED] + 1}))
    model = models.load_model(str(folder))
    np.testing.assert_array_equal(model.params.head, np.asarray(model.params.embed).T + 1)
    assert not model.config.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text


def test_a_tied_head_that_is_stored_alone(rewrite):
    folder = rewrite(lambda weights: weights.update({HEAD: weights.pop(EMBED)}))
    model, expected = models.load_model(str(folder)), models.load_model(str(TIED))
    np.testing.assert_array_equal(model.params.embed, expected.params.embed)
    assert model.params.head is None


@pytest.mark.parametrize(("kind", "name"), [(np.int8, "I8"), (np.uint8, "U8"), (np.int32, "I32")])
def test_integers_are_no_weights(rewrite, kind, name):
    weight = "model.layers.1.mlp.up_proj.weight"

    def change(weights):
        weights[weight] = np.ones(weights[weight].shape, kind)

    with pytest.raises(ValueError, match=f"1 problems:\n  unsupported quantisation: {weight} is {name}"):
        models.load_model(str(rewrite(change)))


def test_a_whole_file_comes_before_an_index(tmp_path):
    folder = shutil.copytree(TIED, tmp_path / "model")
    index = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    np.testing.assert_array_equal(
        models.load_model(str(folder)).params.embed, models.load_model(str(TIED)).params.embed
    )
