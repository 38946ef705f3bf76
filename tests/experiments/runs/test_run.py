import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import retro_jax.experiments.runs.run
from retro_jax import preset
from retro_jax.experiments.io.models import known_model
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.runs.compile import compile_run
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.configs import CONFIGS
from retro_jax.experiments.runs.plan import make_plan
from retro_jax.experiments.tasks.recall import Recall
from retro_jax.models.presets import SIZES
from tests.experiments.runs import stand_in

SMALL = ("--task.pairs", 8, "--task.questions", 3, "--task.count", 3, "--batch", 2, "--windows", 2)
METHODS = ("--methods", "full", "quest", "retro")
FAST = (*SMALL, *METHODS, "--budgets", 64, "--page-size", 8, "--dense-layers", 0)


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    return ("run", "smollm2-recall", "--model", tiny_folder, *FAST, "--out", tmp_path / "out")


def lines(out, process=0):
    return [json.loads(line) for line in (out / f"results-{process}.jsonl").read_text().splitlines()]


def test_run_continues_where_it_stopped_with_the_same_bytes(json_command, arguments, tmp_path, monkeypatch):
    assert json_command(*arguments)["results"] == 9
    file = tmp_path / "out" / "results-0.jsonl"
    whole = file.read_bytes()
    found = lines(tmp_path / "out")
    assert {line["method"] for line in found} == {"full", "quest-b64-p8", "retro-w2-b64-p8"}
    assert all(len(line["scores"]) == 3 and line["config"] == found[0]["config"] for line in found)
    by = {(line["example"], line["method"]): line for line in found}
    assert by["recall-0000", "retro-w2-b64-p8"]["exposure"][1] > 1
    assert by["recall-0000", "quest-b64-p8"]["pages_loaded"] == 8
    assert by["recall-0000", "quest-b64-p8"]["nll"] != by["recall-0000", "retro-w2-b64-p8"]["nll"]
    os.truncate(
        file, len(b"".join(whole.splitlines(keepends=True)[:5])) + 7
    )  # a torn line in the second batch
    assert json_command(*arguments)["results"] == 9
    assert file.read_bytes() == whole
    monkeypatch.setattr(retro_jax.experiments.runs.run, "decode_batch", None)  # nothing is left to decode
    assert json_command(*arguments)["results"] == 9


def test_a_mesh_gives_the_same_results(json_command, arguments, tmp_path):
    json_command(*arguments, "--methods", "retro")
    mesh = ("--data-devices", 2, "--model-devices", 2)
    json_command(*arguments[:-1], tmp_path / "mesh", "--methods", "retro", *mesh)
    for one, other in zip(lines(tmp_path / "out"), lines(tmp_path / "mesh"), strict=True):
        assert (one["example"], one["scores"]) == (other["example"], other["scores"])
        np.testing.assert_allclose(one["nll"], other["nll"], atol=1e-4)


def test_hosts_share_the_work(json_command, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(retro_jax.experiments.runs.run, "decode_batch", stand_in.decode_batch)
    released = []
    monkeypatch.setattr(retro_jax.experiments.runs.run, "release", lambda: released.append(True))
    json_command(*arguments)
    assert len(released) == 2 * 3  # after each batch and method: their programs do not pile up
    whole = {(line["example"], line["method"], line["text"]) for line in lines(tmp_path / "out")}
    monkeypatch.setattr("jax.process_count", lambda: 2)
    parts = []
    for process in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        json_command(*arguments[:-1], tmp_path / "shared")
        found = lines(tmp_path / "shared", process)
        parts.append({(line["example"], line["method"], line["text"]) for line in found})
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    assert parts[0] | parts[1] == whole


def test_another_config_is_refused(json_command, failure, arguments):
    json_command(*arguments, "--limit", 1, "--methods", "full")
    message = failure(*arguments, "--limit", 1, "--methods", "full", "--task.pairs", 9)
    assert "holds another run" in message and "config.task.pairs 8, not 9" in message
    assert "choose another --out" in message


def test_a_folder_of_something_else_is_refused(failure, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "is not a run's folder" in failure(*arguments)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "best"), "method 'best' is unknown; use one of full, quest, retro"),
        (("--budgets", 8), "budget_tokens 8 is below the 2 pages"),
        (("--budgets", 100.5), "budget 100.5 is neither a share"),
        (("--samples", 2), "2 samples at temperature 0"),
        (("--limit", 0), "limit 0 is below 1"),
        (("--batch", 3, "--data-devices", 2), "batch 3 does not divide over data_devices 2"),
        (("--task.questions", 9), "task.questions 9 exceed the task.pairs 8"),
        (("--task.pairs", 10**6), "1000000 codes were asked for"),
        (("--task.pairs", 1000), "positions, "),
        (("--model", "random:llama3.1-70b"), "does not fit: it takes at least 282.66 GB (weights 282.21 GB"),
        (("--device-gb", 1e-6), "over --device-gb 0.00 GB; use more devices"),
        (("--model", "nobody/knows-this", "--compile"), "the sizes of 'nobody/knows-this' are not known"),
        (("--model", "random:tiny"), "random:tiny has no tokenizer"),
    ],
)
def test_refused_before_anything_is_written(failure, arguments, tmp_path, flags, message):
    assert message in failure(*arguments, *flags)
    assert not (tmp_path / "out").exists()


def test_config_typo(capsys, arguments):
    for wrong in (("run", "smollm2-recal"), (*arguments, "--task.pair", 3)):
        with pytest.raises(SystemExit) as stop:
            retro_jax.experiments.cli.main([str(argument) for argument in wrong])
        assert stop.value.code == 2
        assert "smollm2-recall" in (text := capsys.readouterr().err) or "--task.pairs" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(json_command, command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = json_command("run", name, "--dry-run")
    plan = values["plan"]
    assert plan["examples"] > 0 and plan["steps"] == plan["batches"] * plan["new_tokens"] > 100
    assert plan["weights"] > 2e8 and set(plan["caches"]) == set(values["methods"])
    status, out, _ = command("run", name, "--dry-run")
    assert status == 0 and all(label in out for label in values["methods"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_layers(monkeypatch):
    """Two of the layers of a size that configs name."""
    sizes = {"qwen2.5-32b": replace(SIZES["qwen2.5-32b"], num_layers=2)}
    monkeypatch.setattr(retro_jax.experiments.io.models, "SIZES", sizes)


QWEN = ("run", "qwen2.5-32b-longgenbench-gsm8k", "--methods", "retro", "--dense-layers", 1, "--compile")


def test_compiled_from_shapes_for_the_mesh(json_command, two_layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = json_command(*QWEN)
    plan, programs = values["plan"], {program["name"]: program for program in values["programs"]}
    assert programs.keys() == {"prefill", "decode"}
    cache = plan["caches"]["retro-w4"]
    for program in programs.values():  # arguments: tokens too, but not the metrics of the step before
        own = cache - program["other_states"]
        assert program["arguments"] == pytest.approx(plan["weights"] + own, abs=1e5)
        assert program["aliased"] == pytest.approx(own, abs=1e3)
        rows = {"prefill": 1, "decode": 4}[program["name"]]  # of 4, a newcomer, and what newcomers share
        assert own == pytest.approx(cache * rows / 6, rel=1e-3)
        assert program["collectives"]["all-reduce"] == 4  # two in a layer
        assert program["temporary"] > 1e6
    assert not list(tmp_path.iterdir())


def test_what_does_not_compile_into_the_devices_is_an_error(command, two_layers):
    fits = 3.61  # weights and caches alone, 3.60 GB
    status, out, err = command(*QWEN, "--device-gb", fits)
    assert status == 2 and "| retro-w4 | prefill |" in out
    assert "the program 'prefill' of retro-w4 takes" in err and "over --device-gb 3.61 GB" in err


def test_memory_is_that_of_the_arrays():
    config = RunConfig(model="random:tiny", task=Recall(pairs=4, questions=2, count=2), methods=("full",))
    plan = make_plan(config)
    tiny = known_model("random:tiny", None)
    pages, lengths, budget, metrics = 4 * 2 * 16 * 2 * 256 * 4, 4 * 2, 4 * 2, 4 * 3
    assert plan.caches["full"] == pages + lengths + budget + metrics
    embeddings = 2 * 512 * 128
    layer = 2 * 128 + 2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 256
    assert plan.weights == 4 * (embeddings + tiny.num_layers * layer + 128)


def test_what_is_planned_and_compiled_has_the_rows_and_the_room_of_what_runs(monkeypatch):
    task = Recall(pairs=150, questions=2, count=2)
    config = RunConfig(model="random:tiny", task=task, methods=("full",), batch=3)
    plan, of_four = make_plan(config), make_plan(replace(config, batch=4))
    assert plan.caches == of_four.caches
    shapes = []

    def lower(params, model, decode, state, tokens, *_):
        shapes.append((state.length.shape, state.capacity, tokens.shape))
        raise InterruptedError

    monkeypatch.setattr("retro_jax.experiments.runs.compile._extend", SimpleNamespace(lower=lower))
    with pytest.raises(InterruptedError):
        compile_run(config, replace(plan, prompt_tokens=100))
    assert shapes == [((4,), plan.capacity, (4, 128))]


def test_presets_run_beside_methods():
    task = Recall(pairs=4, questions=2, count=2)
    config = RunConfig(
        model="random:tiny",
        task=task,
        methods=("full",),
        presets=("quest", "paper", "mean-key"),
        windows=(2, 4),
        budgets=(256,),
    )
    found = config.configurations()
    assert list(found.values())[1:] == [
        preset("quest", budget_tokens=256),
        *(preset("paper", window=window, budget_tokens=256) for window in (2, 4)),
        preset("mean-key", budget_tokens=256),
    ]
    assert list(found) == [run_name(decode) for decode in found.values()]  # as `compare` names them
    cached = replace(config, decode=replace(config.decode, cache_dtype="int8")).configurations()
    assert list(cached) == list(found) and {own.cache_dtype for own in cached.values()} == {"int8"}
    revised = replace(config, decode=replace(config.decode, revised_layers=0.5)).configurations()
    assert [own.revised_layers for own in revised.values()] == [1.0, 1.0, 0.5, 0.5, 1.0]  # of windows alone
    with pytest.raises(ValueError, match="preset 'best' is unknown; use one of quest, paper, mean-key"):
        replace(config, presets=("best",)).check()


def test_known_models():
    assert known_model("meta-llama/Llama-3.1-8B-Instruct", None).num_layers == 32
    assert known_model("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None).vocab_size == 128256
    assert known_model("Qwen/Qwen2.5-14B-Instruct", "float32").dtype == "float32"
    assert known_model("nobody/knows-this", None) is None
    for name, layers in {
        "google/gemma-3-27b-it": 62,
        "allenai/OLMo-2-1124-7B-Instruct": 32,
        "microsoft/Phi-4-mini-instruct": 32,
        "HuggingFaceTB/SmolLM3-3B": 36,
        "ibm-granite/granite-3.3-8b-instruct": 40,
    }.items():
        assert known_model(name, None).num_layers == layers


@pytest.mark.parametrize("contents", [b"", b'{"model_type"', b"[]"])
def test_a_damaged_model_is_named(tmp_path, contents):
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\); fetch the model again"):
        known_model(str(tmp_path), None)
