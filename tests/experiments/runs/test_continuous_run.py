"""Runs whose sequences come and go: a reply that ends makes room for the next."""

import contextlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

import retro_jax.experiments.runs.run
from retro_jax import NonFiniteLogits, Sampling
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.plan import make_plan, plan_text
from retro_jax.experiments.runs.run import TERMINATED
from retro_jax.experiments.runs.work import Row, decode_many
from retro_jax.experiments.tasks import Example
from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.recall import Recall
from retro_jax.models.presets import SIZES
from tests.experiments.runs.test_run import FAST, lines

SAMPLED = ("--task.no-forced", "--samples", 2, "--temperature", 1.0, "--methods", "quest")


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    return ("run", "smollm2-recall", "--model", tiny_folder, *FAST, "--out", tmp_path / "out")


def by_sample(out):
    """The results of a run of one method, each of which must be there once."""
    found = lines(out)
    results = {(line["example"], line["sample"]): line | {"config": None} for line in found}
    assert len(results) == len(found) == 6
    return results


def test_replies_do_not_depend_on_what_is_decoded_with_them(json_command, arguments, tmp_path):
    json_command(*arguments, *SAMPLED)
    came_and_went = by_sample(tmp_path / "out")
    assert len({line["text"] for line in came_and_went.values()}) == 6  # seeds of their own
    (timing,) = map(json.loads, (tmp_path / "out" / "timings-0.jsonl").read_text().splitlines())
    assert timing["tokens"] == sum(line["tokens"] for line in came_and_went.values())
    assert timing["seconds"] > 0 and timing["steps_per_second"] is None
    json_command(*arguments[:-1], tmp_path / "fixed", *SAMPLED, "--batch", 3, "--no-continuous")
    assert by_sample(tmp_path / "fixed") == came_and_went
    timings = [*map(json.loads, (tmp_path / "fixed" / "timings-0.jsonl").read_text().splitlines())]
    assert len(timings) == 2 and all(timing["seconds"] > 0 for timing in timings)  # batches


@pytest.mark.parametrize("kind", ["_at_once", "_refilled"])
def test_compiling_and_grading_are_no_part_of_what_a_batch_took(monkeypatch, kind):
    run, now = retro_jax.experiments.runs.run, [0.0]
    result = {"prompt_tokens": 10, "tokens": 4}

    def decode_batch(model, decode, task, batch, size, sampling, progress):
        now[0] += 5.0
        progress("decode", 4, 4)
        now[0] += 60.0  # grades
        return [result] * 2

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "decode_batch", decode_batch)
    monkeypatch.setattr(run, "decode_many", lambda *_: [(0, result, 2.0), (1, result, 3.0)])

    class Show:
        compile_seconds = 1.5

        def __call__(self, *_):
            pass

    config = RunConfig(model="random:tiny", task=AIME24(), batch=2)
    job = run.Job(config, "full", None, [], [0, 1], SimpleNamespace(append=lambda lines: None), "")
    monkeypatch.setattr(run.Job, "keep", lambda *_: None)
    more = [lambda: False] if kind == "_refilled" else []
    took = getattr(run, kind)(job, None, Show(), *more)
    assert (took["seconds"], took["context"]) == (3.5, 12.0)


def test_replies_that_came_and_went_are_made_once(json_command, command, arguments, tmp_path, monkeypatch):
    stops = iter((False, False, True))
    monkeypatch.setattr(
        retro_jax.experiments.runs.run,
        "stop_on_sigterm",
        lambda: contextlib.nullcontext(lambda: next(stops, False)),
    )
    status, _, _ = command(*arguments, *SAMPLED)
    file = tmp_path / "out" / "results-0.jsonl"
    assert status == TERMINATED and len(file.read_text().splitlines()) == 2  # as soon as they were finished
    os.truncate(file, file.stat().st_size - 7)  # a torn line
    seen, real = [], retro_jax.experiments.runs.work.generate_many

    def counted(model, requests, *arguments, **options):
        seen.append(len(requests))
        return real(model, requests, *arguments, **options)

    monkeypatch.setattr(retro_jax.experiments.runs.work, "generate_many", counted)
    monkeypatch.setattr(retro_jax.experiments.runs.run, "ROUNDS", 1)  # other batches than before
    json_command(*arguments, *SAMPLED)
    assert sum(seen) == 5 and max(seen) == 2
    json_command(*arguments[:-1], tmp_path / "whole", *SAMPLED)
    assert by_sample(tmp_path / "out") == by_sample(tmp_path / "whole")


def test_a_reply_that_is_not_finite_is_named(monkeypatch):
    def broken(model, requests, *_, **__):
        yield SimpleNamespace(index=1, tokens=[], finished=False, metrics=None)
        raise NonFiniteLogits("of prompt 0", SimpleNamespace(index=0, tokens=[1, 2]))

    monkeypatch.setattr("retro_jax.experiments.runs.work.generate_many", broken)
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    model = SimpleNamespace(tokenizer=tokenizer, config=SIZES["tiny"])
    batch = [Row(Example(id=name, prompt="", answers=("1",), max_new_tokens=5), 0, (1,)) for name in "abc"]
    found = decode_many(model, None, AIME24(), batch, [1, 2], 2, Sampling())
    assert next(found)[0] == 2  # the place in the batch, not among what was missing
    with pytest.raises(NonFiniteLogits, match="the logits of b are not finite after 2 new tokens"):
        next(found)


def test_sequences_come_and_go_where_replies_are_generated():
    config = RunConfig(model="random:tiny", task=Recall(pairs=4, questions=2, count=2), batch=4)
    generated = replace(config, task=replace(config.task, forced=False))
    one, several, fixed, forced = (
        make_plan(each)
        for each in (
            replace(generated, batch=1),
            generated,
            replace(generated, continuous=False),
            config,
        )
    )
    assert forced.forced and not several.forced
    sequence = one.caches["full"]
    assert fixed.caches["full"] == forced.caches["full"] == pytest.approx(4 * sequence, abs=100)
    assert several.caches["full"] == pytest.approx(6 * sequence, abs=100)  # of newcomers, and what they share
    told = plan_text(generated, several, generated.configurations())
    assert "4 together, the next as soon as one ends" in told
    assert "replies of up to" in told
    told = plan_text(config, forced, config.configurations())
    assert "in 1 batch of 4" in told  # for which --no-continuous changes nothing
    assert f"replies of about {forced.new_tokens}, which are given and decoded along" in told
    assert replace(generated, continuous=False).identity() == generated.identity()
