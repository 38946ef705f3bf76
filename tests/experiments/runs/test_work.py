"""The rows of a run: how they are batched, decoded and graded."""

from types import SimpleNamespace

import pytest

from retro_jax import Sampling
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.plan import make_plan
from retro_jax.experiments.runs.work import Row, decode_batch, encode, make_batches
from retro_jax.experiments.tasks import Example
from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.ruler import RULER
from retro_jax.models.presets import SIZES
from tests.experiments.runs import stand_in


def test_batches_are_of_similar_lengths():
    rows = [
        Row(Example(id=f"{i:02}", prompt="", max_new_tokens=5), 0, (0,) * length)
        for i, length in enumerate((3, 9, 1, 9, 4))
    ]
    assert [[row.example.id for row in batch] for batch in make_batches(rows, 2)] == [
        ["01", "03"],
        ["04", "00"],
        ["02"],
    ]
    assert make_batches(rows[::-1], 2) == make_batches(rows, 2)


def test_a_batch_has_one_reply_limit():
    rows = [
        Row(Example(id=f"{i:02}", prompt="", max_new_tokens=limit), 0, (0,) * (20 - limit))
        for i, limit in enumerate((5, 9, 5, 9, 9))
    ]
    batches = make_batches(rows, 2)
    assert [[row.example.id for row in batch] for batch in batches] == [["00", "02"], ["01", "03"], ["04"]]


def test_an_example_made_to_measure_is_filled_by_the_tokens_that_its_model_sees(monkeypatch):
    tokenizer = stand_in.Letters()
    tokenizer.chat_template, tokenizer.chat = "", lambda messages: f"<{messages[0]['content']}>"
    tokenizer.decode = lambda ids: "".join(map(chr, ids))
    (example,) = RULER(("vt",), length=1600, count=1).examples(0, None)
    row = encode(tokenizer, example)
    assert 1600 - 30 < row.tokens <= 1600 and row.tokens == len(row.prompt) + 30
    assert tokenizer.decode(row.prompt) == f"<{row.example.prompt}>{example.reply}"

    written = f" {example.answers[0]}, {example.answers[2]}"
    made = SimpleNamespace(tokens=[list(map(ord, written))], finished=[False], metrics=None)
    monkeypatch.setattr("retro_jax.experiments.runs.work.generate", lambda *_, **__: made)
    model = SimpleNamespace(tokenizer=tokenizer, config=SIZES["smollm2-135m"])
    (result,) = decode_batch(model, None, RULER(), [row], 1, Sampling(), None)
    assert (result["part"], result["scores"]) == ("vt", [0.4])


def test_what_is_made_to_measure_may_take_all_positions_of_its_model():
    task = RULER(("niah_single_1", "vt"), length=8192, count=3)
    plan = make_plan(RunConfig(model="smollm2-135m", task=task, methods=("full",), batch=2))
    assert (plan.prompt_tokens, plan.new_tokens, plan.positions) == (8192 - 30, 128, 8192)
    assert plan.examples == 6 and plan.batches == 4  # two of each reply limit


@pytest.mark.parametrize(
    ("template", "written", "score"),
    [
        ("{}<think>\n", "It may be 73.", 0),  # cut off while reasoning, which the prompt had begun
        ("{}<think>\n", "It may be 12.</think>73", 1),
        ("{}<think>\n\n</think>\n\n", "73", 1),
        ("{}", "73", 1),
        ("{}", "<think>73", 0),
    ],
)
def test_drafts_are_not_graded(monkeypatch, template, written, score):
    tokenizer = SimpleNamespace(
        chat_template=template,
        chat=lambda messages: template.format(messages[0]["content"]),
        encode=lambda text, add_bos: list(map(ord, text)),
        decode=lambda ids: "".join(map(chr, ids)),
    )
    model = SimpleNamespace(tokenizer=tokenizer, config=SIZES["tiny"])
    made = SimpleNamespace(tokens=[list(map(ord, written))], finished=[False], metrics=None)
    monkeypatch.setattr("retro_jax.experiments.runs.work.generate", lambda *_, **__: made)
    row = encode(tokenizer, Example(id="a", prompt="Q", answers=("73",), max_new_tokens=50, chat=True))
    (result,) = decode_batch(model, None, AIME24(), [row], 1, Sampling(), None)
    assert result["scores"] == [score] and result["text"] == written
