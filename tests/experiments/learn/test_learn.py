"""`retro-jax learn`: it learns, goes on after kills to the same numbers, and what it writes decodes."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import retro_jax as rj
from retro_jax.experiments.learn import command as learn_command
from retro_jax.experiments.learn import training
from retro_jax.experiments.learn.distill import Selected, dense_layer, loss_and_gradient, page_shares, recalls
from retro_jax.learned import initial_score
from retro_jax.models import LayerKind, Rope
from retro_jax.models.presets import SIZES
from retro_jax.models.transformer import random_params

# Orbax leaves coroutines behind where it cannot read a checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.experiments.learn.test_learn"])
TINY = SIZES["tiny"]
STEPS = 4
FLAGS = ["--page-size", "4", "--channels", "4", "--chunk", "64", "--queries", "16", "--budget-tokens", "12"]
FLAGS += ["--steps", str(STEPS), "--evaluate-every", "1", "--dtype", "float32", "--held-out", "0.2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["the ", "old ", "house ", "stood ", "by ", "it\n"], 900)
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def whole(tiny_folder, text, tmp_path_factory):
    """The folder of a training that nobody disturbed."""
    jax.config.update("jax_disable_most_optimizations", True)  # as in tests, and in those that are killed
    out = tmp_path_factory.mktemp("whole") / "score"
    learn_command.Learn(**arguments(tiny_folder, text, out)).run()
    return out


def arguments(model, text, out, **changes):
    values = zip(FLAGS[::2], FLAGS[1::2], strict=True)
    fields = {name.lstrip("-").replace("-", "_"): value for name, value in values}
    kinds = {"held_out": float, "dtype": str}
    fields = {name: kinds.get(name, int)(value) for name, value in fields.items()}
    return {"model": str(model), "text": (text,), "out": out} | fields | changes


def learn(fields, programs):
    """The process to be killed."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    learn_command.Learn(**fields).run()


def last_checkpoint(folder):
    with training.checkpoints(folder / learn_command.CHECKPOINTS) as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.StandardRestore())


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in leaves(tree[name])]
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [] if tree is None else [np.asarray(tree)]


def test_it_learns_and_keeps_the_best_and_the_last(whole):
    log = [json.loads(line) for line in (whole / learn_command.LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(1, STEPS + 1)]
    assert all(0 < line["recall"] <= line["exact"] + 1e-6 <= 1 + 2e-6 for line in log)
    best = max(log, key=lambda line: line["recall"])
    about = json.loads((whole / "score.json").read_text())
    assert (about["step"], about["recall"]) == (best["step"], best["recall"])
    assert {int(path.name) for path in (whole / "checkpoints").iterdir()} == {STEPS, best["step"]}


def test_killed_twice_it_comes_to_the_same_numbers(whole, tiny_folder, text, tmp_path):
    out = tmp_path / "score"
    for lines in (1, 2):
        process = CONTEXT.Process(target=learn, args=(arguments(tiny_folder, text, out), tmp_path))
        process.start()
        deadline, log = time.monotonic() + 200, out / learn_command.LOG
        while not log.exists() or log.read_text().count("\n") < lines:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "score.json").exists()
    with pytest.raises(ValueError, match=r"has no score.json, so it holds no finished score; where training"):
        rj.load_score(rj.load_model(str(tiny_folder), "float32"), out)
    learn_command.Learn(**arguments(tiny_folder, text, out)).run()
    assert (out / "score.safetensors").read_bytes() == (whole / "score.safetensors").read_bytes()
    (step, found), (_, expected) = last_checkpoint(out), last_checkpoint(whole)
    assert step == STEPS
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_folder_decodes(whole, tiny_folder, text, json_command, failure):
    decode = ["--text", text, "--tokens", "96", "--prompt-tokens", "64", "--dtype", "float32"]
    decode += ["--dense-layers", "0"]
    learned = ["--score", "learned", "--learned", whole, "--page-size", "4", "--score-channels", "4"]
    small = ["--preset", "mean-key", "--budget-tokens", "12", "--budget-covers", "pages"]
    by_score = json_command("score", tiny_folder, *decode, *small, *learned)
    assert by_score["config"]["score"] == "learned" and np.isfinite(by_score["nll"]["mean"])
    for words, flags in (
        ("--score learned needs --learned FOLDER", learned[:2] + learned[4:]),
        ("was given and nothing selects by it; add --score learned", learned[2:]),
        ("--page-size is 8, but the score in", [*learned[:5], "8", *learned[6:]]),
        ("--score-channels is 8, but the score in", [*learned[:7], "8"]),
    ):
        assert words in failure("score", tiny_folder, *decode, *small, *flags)


def test_replies_by_another_score_are_refused(whole, tiny_folder, text, json_command, failure, tmp_path):
    other, prompts = tmp_path / "other", tmp_path / "prompts.jsonl"
    json_command("learn", tiny_folder, "--text", text, "--out", other, *FLAGS, "--seed", 3)
    prompts.write_text('{"prompt": "The old house"}\n')
    flags = ["--prompts", prompts, "--out", tmp_path / "replies.jsonl", "--max-new-tokens", "2", "--dtype"]
    flags += ["float32", "--preset", "mean-key", "--score", "learned", "--page-size", "4"]
    flags += ["--score-channels", "4", "--budget-tokens", "12", "--learned"]
    assert json_command("generate", tiny_folder, *flags, whole)["replies"] == 1
    assert json_command("generate", tiny_folder, *flags, whole)["replies"] == 0
    assert "made in another way" in failure("generate", tiny_folder, *flags, other)


@pytest.mark.parametrize(
    ("spoil", "words"),
    (
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "score.json").write_text('{"format'), "score.json is damaged"),
        (lambda folder: change(folder, format=9), "has format 9, this version reads 1"),
        (lambda folder: os.truncate(folder / "score.safetensors", 99), "is damaged .it is not the file"),
        (lambda folder: change(folder, model={"layers": 7}), "a score of another model.*layers 7, not 2"),
    ),
)
def test_folders_that_are_refused(spoil, words, whole, tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("score.json", "score.safetensors"):
        shutil.copy(whole / name, folder)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        rj.load_score(rj.load_model(str(tiny_folder), "float32"), folder)


def change(folder, **fields):
    about = json.loads((folder / "score.json").read_text())
    (folder / "score.json").write_text(json.dumps(about | fields))


def test_a_score_is_of_one_model_in_any_dtype(whole, tiny_folder):
    model = rj.load_score(rj.load_model(str(tiny_folder), "bfloat16"), whole)
    score = model.params.layers[1].page_score
    assert (score.channels, score.page_size, score.query.dtype) == (4, 4, "float32")
    other = rj.load_model(str(tiny_folder), "float32")
    layers = tuple(layer.replace(wqkv=layer.wqkv * 1.5) for layer in other.params.layers)
    object.__setattr__(other, "params", other.params.replace(layers=layers))
    with pytest.raises(ValueError, match=r"a score of another model, .*digest"):
        rj.load_score(other, whole)


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (["--chunk", "4096"], "tokens, fewer than a chunk of 4096; lower --chunk, or leave the text out"),
        (["--chunk", "62"], "--chunk 62 is not a multiple of --page-size 4"),
        (["--channels", "5"], "--channels 5 is not an even number"),
        (["--channels", "64"], "--channels 64 is above"),
        (["--steps", "0"], "--steps 0 is below 1"),
        (["--held-out", "1.0"], "--held-out 1.0 is not a share"),
        (["--learning-rate", "0"], "--learning-rate 0.0 is not above 0"),
        (["--budget-tokens", "4"], "--budget-tokens 4 is below two pages of 4 tokens"),
        (["--budget-tokens", "64"], "--budget-tokens 64 covers all of a chunk of 64 tokens"),
    ),
)
def test_flags_that_are_refused(flags, words, tiny_folder, text, tmp_path, failure):
    assert words in failure("learn", tiny_folder, "--text", text, "--out", tmp_path / "out", *FLAGS, *flags)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_refused(whole, tiny_folder, text, failure):
    told = failure("learn", tiny_folder, "--text", text, "--out", whole, *FLAGS, "--seed", "3")
    assert "holds another training (seed 0, not 3)" in told


def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with training.checkpoints(tmp_path / "checkpoints") as manager:
        like = manager.restore(STEPS, args=ocp.args.StandardRestore())

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(manager, "save", full)
            with pytest.raises(
                OSError, match=rf"step 9 could not be .*.the disk is full.; that of step {STEPS} is whole"
            ):
                training.save(manager, 9, like, {"recall": 1.0})
    with training.checkpoints(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == STEPS


def test_training_tells_estimated_from_true_shares_less_and_less():
    rng, kind = np.random.default_rng(0), LayerKind(Rope(100.0))
    q, k = (jnp.asarray(rng.normal(size=(32, heads, 8)), jnp.float32) for heads in (2, 1))
    score, at = initial_score(TINY, kind, q, k, 4, 4), jnp.arange(4, 32)
    plan = training.Plan(4, 4, 40, 28, 0.03, 1, 3, seed=0)
    trained, losses = training.Training((score,), plan.optimizer().init((score,))), []
    for _ in range(plan.steps):
        loss, gradient = loss_and_gradient(*trained.scores, TINY, kind, q, k, at)
        trained = training._update(plan)(trained, (gradient,))
        losses.append(float(loss))
    assert 0 < losses[-1] < 0.5 * losses[0]
    recalled = recalls(*trained.scores, TINY, kind, q, k, at, Selected(4, 3))
    assert recalled[2] < recalled[0] <= recalled[1]


def test_a_damaged_checkpoint_is_told(whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with training.checkpoints(tmp_path / "checkpoints") as manager:
        like = manager.restore(STEPS, args=ocp.args.StandardRestore())
        np.testing.assert_array_equal(leaves(training.restore(manager, STEPS, like))[0], leaves(like)[0])
    for file in (tmp_path / "checkpoints" / str(STEPS) / "default" / "d").iterdir():
        os.truncate(file, 9)
    told = pytest.raises(ValueError, match=rf"of step {STEPS} in .* is damaged .*; remove its folder")
    with training.checkpoints(tmp_path / "checkpoints") as manager, told:
        training.restore(manager, STEPS, like)


def test_shares_are_attention_summed_by_page():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(8, heads, 4)).astype(np.float32) for heads in (4, 2))
    found = np.asarray(page_shares(q[5:6], k, np.array([5]), 2))[0, 1]
    weights = np.exp(q[5, 2:] @ k[:6, 1].T / 2)
    expected = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0).reshape(3, 2).sum(axis=1)
    np.testing.assert_allclose(found, [*expected, 0], rtol=1e-5)


def test_the_order_of_chunks_takes_turns():
    plan = training.Plan(4, 4, 9, 8, 1e-3, 1, 3, seed=0)
    order = [plan.chunk(step, 5) for step in range(10)]
    assert sorted(order[:5]) == sorted(order[5:]) == [*range(5)] and order[:5] != order[5:]
    at = plan.positions(3, 64)
    assert len(set(at.tolist())) == 8 and min(at) >= 4 and at.tolist() == plan.positions(3, 64).tolist()


def test_fused_attention_of_a_gpu_takes_the_place_of_blocks(monkeypatch):
    """What a GPU computes, by XLA here: the layer's output is that of blocks, up to rounding."""
    config = dataclasses.replace(TINY, dtype="bfloat16")
    layer = random_params(config, jax.random.key(0)).layers[0]
    x = jax.random.normal(jax.random.key(1), (40, config.width), jnp.bfloat16)
    by_blocks = dense_layer(layer, config, config.layers[0], x)
    dense_layer.clear_cache()
    fused, asked = jax.nn.dot_product_attention, []

    def by_xla(*arrays, is_causal, implementation):
        asked.append(implementation)
        return fused(*arrays, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    at_once = dense_layer(layer, config, config.layers[0], x)
    dense_layer.clear_cache()
    assert asked == ["cudnn"]
    for one, other in zip(by_blocks, at_once, strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=0.05, rtol=0.02)
