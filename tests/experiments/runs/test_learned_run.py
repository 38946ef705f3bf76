"""Runs that select by a learned score: over devices, and from a folder that holds the score."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import retro_jax as rj
from retro_jax.experiments.io.models import check_learned
from retro_jax.models import LearnedScore
from retro_jax.score_files import ABOUT, WEIGHTS, model_identity, score_about, score_tensors

SIZE, CHANNELS = 8, 4
FLAGS = ("--task.pairs", 8, "--task.questions", 2, "--task.count", 1, "--batch", 1, "--methods", "quest")
FLAGS += ("--budgets", 64, "--page-size", SIZE, "--dense-layers", 0, "--group-reduce", "mass")
FLAGS += ("--score", "learned", "--score-channels", CHANNELS)


def scores(config) -> tuple[LearnedScore, ...]:
    """Random ones of all layers."""
    rng, (N, K, D) = np.random.default_rng(0), (config.num_heads, config.num_kv_heads, config.head_dim)
    sizes = {
        "query": (N, D, CHANNELS),
        "query_bias": (N, CHANNELS),
        "key": (K, 3 * D, CHANNELS),
        "key_bias": (K, CHANNELS),
        "log_frequencies": (K, CHANNELS // 2),
    }
    return tuple(
        LearnedScore(
            **{name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()},
            page_size=SIZE,
        )
        for _ in config.layers
    )


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A score of a model, and the model written with it."""
    model, folder = rj.load_model(str(tiny_folder)), tmp_path_factory.mktemp("learned")
    found = scores(model.config)
    weights = safetensors.numpy.save(score_tensors(found))
    about = score_about(model, model_identity(model.params, model.config), found, weights)
    (folder / "score").mkdir()
    (folder / "score" / WEIGHTS).write_bytes(weights)
    (folder / "score" / ABOUT).write_text(json.dumps(about))
    rj.save_model(rj.load_score(model, folder / "score"), folder / "model")
    return folder / "score", folder / "model"


def test_a_mesh_and_a_model_that_holds_the_score_give_the_same_results(
    json_command, folders, tiny_folder, tmp_path
):
    score, written = folders
    found = []
    for name, model, flags in (
        ("one", tiny_folder, ("--learned", score)),
        ("mesh", tiny_folder, ("--learned", score, "--model-devices", 2)),
        ("written", written, ("--model-devices", 2)),
    ):
        json_command("run", "smollm2-recall", "--model", model, *FLAGS, *flags, "--out", tmp_path / name)
        (line,) = (tmp_path / name / "results-0.jsonl").read_text().splitlines()
        found.append(json.loads(line))
    assert found[0]["pages_loaded"] == 8
    for other in found[1:]:
        assert other["scores"] == found[0]["scores"]
        np.testing.assert_allclose(other["nll"], found[0]["nll"], atol=1e-4)


@pytest.mark.parametrize("several", [False, True], ids=["device", "mesh"])
def test_a_score_lies_where_the_weights_do(folders, tiny_folder, several):
    model, device = rj.load_model(str(tiny_folder)), jax.devices()[2]
    params = jax.device_put(model.params, device)
    if several:  # one device of a mesh
        params = rj.shard_params(params, model.config, rj.make_mesh(1, 1, [device]))
    found = rj.load_score(dataclasses.replace(model, params=params), folders[0])
    assert {tuple(leaf.devices()) for leaf in jax.tree.leaves(found.params)} == {(device,)}
    assert found.params.layers[0].page_score is not None


LEARNED = rj.DecodeConfig(score="learned", score_channels=CHANNELS, page_size=SIZE)


def test_a_model_that_holds_a_score_needs_no_folder_of_it(folders, tmp_path):
    score, written = folders
    check_learned(None, [LEARNED], str(written))
    check_learned(score, [LEARNED], str(written))
    plain = rj.load_model(str(written))
    layers = tuple(layer.replace(page_score=None) for layer in plain.params.layers)
    plain = dataclasses.replace(plain, params=plain.params.replace(layers=layers))
    rj.save_model(plain, tmp_path / "plain")
    for model in (tmp_path / "plain", "random:tiny"):
        with pytest.raises(ValueError, match="--score learned needs --learned FOLDER, or a model"):
            check_learned(None, [LEARNED], str(model))
    check_learned(None, [rj.DecodeConfig()], str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"page_size": 16}, "--page-size is 16, but the score in .* was trained with 8; use --page-size 8"),
        ({"score_channels": 8}, "--score-channels is 8, but the score in .* was trained with 4"),
    ),
)
def test_a_score_for_other_pages_or_channels_is_refused(folders, fields, words):
    score, written = folders
    for folder, model in ((score, "random:tiny"), (None, str(written))):
        with pytest.raises(ValueError, match=words):
            check_learned(folder, [dataclasses.replace(LEARNED, **fields)], model)
