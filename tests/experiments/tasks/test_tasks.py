import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from retro_jax.experiments.tasks import TASKS, Asked, Example, Passage, Task
from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.gpqa import CHOICES, GPQA
from retro_jax.experiments.tasks.livecodebench import LiveCodeBench
from retro_jax.experiments.tasks.longbench import LongBench, f1, paragraph, rouge_l
from retro_jax.experiments.tasks.longgenbench import READ, LongGenBench
from retro_jax.experiments.tasks.needles import Needles
from retro_jax.experiments.tasks.pg19 import PG19
from retro_jax.experiments.tasks.questions import Question
from retro_jax.experiments.tasks.recall import Recall

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def gsm8k(tmp_path):
    def records(split, count):
        return [
            {
                "question": f"What is {i} + 1000, {split}?",
                "answer": f"Add.\n{i}+1000=<<{i}+1000={i}>>.\n#### 1,{i:03}",
            }
            for i in range(count)
        ]

    write_lines(tmp_path / "train.jsonl", records("train", 4))
    write_lines(tmp_path / "test.jsonl", records("test", 7))
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_protocol(name):
    task = TASKS[name]()
    assert isinstance(task, Task)
    task.check()
    nominal = task.nominal()
    assert min(nominal.examples, nominal.prompt_chars, nominal.new_tokens) > 0
    assert hash(task) == hash(TASKS[name]())
    if task.local:
        found = task.examples(0, None)
        assert found == task.examples(0, None) and found[:1] == task.examples(0, 1)
        assert len({example.id for example in found}) == len(found) > 0


def test_longgenbench(gsm8k):
    task = LongGenBench(data=gsm8k, n=3, shots=2, tokens_per_answer=10)
    examples = task.examples(0, None)
    assert len(examples) == 2 and examples[0].max_new_tokens == 30 and examples[0].chat
    assert len(set(examples[0].answers + examples[1].answers)) == 6
    prompt = examples[0].prompt
    assert "<<" not in prompt and prompt.count("Question_3:") == 1 and prompt.count("Answer_2:") == 1
    assert "train?" in prompt.split("Now answer")[0] and "train?" not in prompt.split("Now answer")[1]
    assert examples != task.examples(1, None)
    first, _, third = examples[0].answers
    reply = f"Answer_1: The answer is {first}.\nAnswer_3:\nso 1,{third[1:]}\nAnswer_4: The answer is 3."
    assert task.grade(examples[0], reply) == [1.0, 0.0, 1.0]


@needs_data
@pytest.mark.parametrize("source", ["gsm8k", "mmlu", "commonsenseqa"])
@pytest.mark.parametrize("n", [15, 45])
def test_longgenbench_on_real_data(source, n):
    task = LongGenBench(source, DATA / source, n=n)
    examples = task.examples(0, 3)
    for example in examples:
        assert len(example.answers) == n and f"Question_{n}:" in example.prompt
        form = "The answer is ({})." if source != "gsm8k" else "The answer is {}."
        right = "\n".join(f"Answer_{i}: {form.format(a)}" for i, a in enumerate(example.answers, 1))
        assert task.grade(example, right) == [1.0] * n
        left_out = [line for line in right.splitlines() if not line.startswith("Answer_2:")]
        assert task.grade(example, "\n".join(left_out)) == [1.0, 0.0] + [1.0] * (n - 2)
        drafts = "<think>\nQuestion_1: Answer_1: The answer is 1.\nAnswer_2: The answer is (A).\n</think>\n"
        assert task.grade(example, drafts + right) == [1.0] * n


def test_recall_and_needles():
    for task in (Recall(pairs=9, questions=4, count=2), Needles(words=80, needles=4, count=2)):
        for example in task.examples(3, None):
            assert isinstance(example, Asked) and len(example.cues) == len(example.answers) == 4
            for cue, answer in zip(example.cues, example.answers, strict=True):
                assert example.prompt.count(cue.strip(".\n") + answer + ".") == 1


def test_recall_generated():
    task = Recall(pairs=9, questions=3, count=1, forced=False)
    (example,) = task.examples(0, None)
    whole = " ".join(example.answers)
    reply = whole.removeprefix(example.reply)
    assert reply != whole and task.grade(example, reply) == [1.0, 1.0, 1.0]
    marked = reply.replace(" is ", " is: **").replace(".", "**.")
    assert marked != reply and task.grade(example, marked) == [1.0, 1.0, 1.0]
    assert task.grade(example, reply.replace(example.answers[1], "")) == [1.0, 0.0, 1.0]
    wrong = example.answers[2][:-3] + ("00." if example.answers[2][-3:-1] != "00" else "11.")
    assert task.grade(example, reply.replace(example.answers[2], wrong + "\n" + example.answers[2])) == [
        1,
        1,
        0,
    ]


def test_needles_need_enough_text(tmp_path):
    (tmp_path / "short.txt").write_text("One. Two. Three.")
    with pytest.raises(ValueError, match=r"3 words, fewer than task\.words 80"):
        Needles(data=tmp_path / "short.txt", words=80).examples(0, None)


def test_pg19(tmp_path):
    (tmp_path / "b.txt").write_text("word " * 1000)
    (tmp_path / "a.txt").write_text("".join(f"w{i} " for i in range(1000)))
    examples = PG19(data=tmp_path, prompt_tokens=4, tokens=12, excerpts=3).examples(0, None)
    assert [example.id for example in examples] == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]
    assert all(isinstance(example, Passage) and example.max_new_tokens == 8 for example in examples)
    numbers = [[int(word[1:]) for word in example.prompt.split()[:-1]] for example in examples[:3]]
    assert max(numbers[0]) < min(numbers[1]) and max(numbers[1]) < min(numbers[2])
    (whole,) = PG19(data=tmp_path / "a.txt", prompt_tokens=4, tokens=12).examples(5, None)
    assert whole.prompt.startswith("w0 w1 ")


@needs_data
def test_aime24_on_real_data():
    task = AIME24(data=DATA / "aime24")
    examples = task.examples(0, None)
    assert len(examples) == 30 and all(0 <= int(example.answers[0]) <= 999 for example in examples)
    answer = examples[0].answers[0]
    assert task.grade(examples[0], f"<think>\\boxed{{1}}</think> So \\boxed{{{answer}}}.") == [1.0]
    assert task.grade(examples[0], f"<think>\\boxed{{{answer}}}</think> So \\boxed{{1000}}.") == [0.0]


def test_aime24(tmp_path):
    solution = "Pages 3-5: $m + n = 70 + 3 = \\framebox{073}$.\n~someone, 2024"
    records = [{"id": 1, "problem": "Q", "answer": "073"}, {"id": 2, "problem": "Q", "answer": 204}]
    examples = AIME24(data=write_lines(tmp_path / "test.jsonl", records)).examples(0, None)
    assert [example.answers for example in examples] == [("73",), ("204",)]
    assert AIME24().grade(examples[0], solution) == [1.0]
    assert AIME24().grade(examples[0], f"<think>{solution}</think>\\boxed{{72}}") == [0.0]
    write_lines(tmp_path / "test.jsonl", [{"problem": "Q", "answer": "1/2"}])
    with pytest.raises(ValueError, match=r"test\.jsonl: the answer '1/2' is no whole number; is this AIME"):
        AIME24(data=tmp_path).examples(0, None)


def test_solutions_of_gsm8k_are_right_replies(gsm8k):
    task = LongGenBench(data=gsm8k, n=3, shots=0)
    solutions = [json.loads(line)["answer"] for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    for example in task.examples(0, None):
        chosen = [next(s for s in solutions if s.endswith(f"1,{a[1:]}")) for a in example.answers]
        reply = "\n\n".join(f"### Answer {i}\n{solution}" for i, solution in enumerate(chosen, 1))
        assert task.grade(example, f"<think>1. {solutions[0]}</think>\n{reply}") == [1.0] * 3


@pytest.mark.parametrize("source", ["mmlu", "commonsenseqa"])
def test_solutions_of_choices_are_right_replies(source):
    example = Example(id="x", prompt="", answers=("B", "D"))
    for form in ("({})", "{}.", "The answer is ({}).", "\\boxed{{{}}}", "The correct option is {}."):
        reply = "\n".join(f"Answer_{i}: {form.format(a)}" for i, a in enumerate(example.answers, 1))
        assert LongGenBench(source, n=2).grade(example, reply) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("subset", "answer", "reply"),
    [
        ("hotpotqa", "Lyon", "Lyon"),
        ("passage_retrieval_en", "Paragraph 7", "Paragraph 7"),
        ("gov_report", "a", "a"),
    ],
)
def test_reasoning_costs_nothing_in_longbench(subset, answer, reply):
    task, example = LongBench(subset), Example(id="x", prompt="", answers=(answer,))
    thought = "Paris? Paragraph 3 says a.\n</think>\n\n"
    assert task.grade(example, thought + reply) == task.grade(example, reply) == [pytest.approx(1.0)]
    assert task.grade(example, "<think>" + answer) == [0.0]


def test_gpqa(tmp_path):
    header = ("Record ID", "Question", *CHOICES)
    rows = [header, *((f"r{i}", f'"Q, {i}?"', "right", "x", "y", "z") for i in range(12))]
    (tmp_path / "gpqa_diamond.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    task = GPQA(data=tmp_path)
    examples = task.examples(0, None)
    assert len({example.answers for example in examples}) == 4  # every letter is right somewhere
    for example in examples:
        (letter,) = example.answers
        assert f"({letter}) right" in example.prompt
        assert task.grade(example, f"thus \\boxed{{{letter}}}") == [1.0]
    assert [e.answers for e in examples] != [e.answers for e in task.examples(1, None)]


def test_longbench_metrics():
    assert f1("The cat sat.", "a cat") == pytest.approx(2 / 3)  # cat sat, cat
    assert f1("dog", "cat") == 0.0 and f1("", "cat") == 0.0
    assert paragraph("Paragraph 3, not 4", "Paragraph 3") == 0.5
    assert paragraph("none", "Paragraph 3") == 0.0


@pytest.mark.parametrize(
    ("reply", "answer", "value"),  # of the package rouge 1.0.1
    [
        ("a b c d", "a c e", 0.5714285665),
        ("A b", "a b", 0.4999999950),
        ("the cat. sat there", "the cat sat. there it sat", 0.6666666617),
        ("a b a b a b. c", "b a. c d. ", 0.7499999953),
        ("the dog. and a cat. ", "a cat and the dog.", 0.7272727223),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("...", "y", 0.0),
    ],
)
def test_rouge_l(reply, answer, value):
    assert rouge_l(reply, answer) == pytest.approx(value, abs=1e-10)


def test_longbench(tmp_path):
    record = {"input": "Who?", "context": "Text.", "answers": ["Ann Lee", "Ann"]}
    path = write_lines(tmp_path / "qasper.jsonl", [record])
    task = LongBench("qasper", data=path)
    (example,) = task.examples(0, None)
    assert example.prompt.startswith("Text.") and example.prompt.endswith("Who?")
    assert task.grade(example, "Ann.") == [1.0]
    with pytest.raises(ValueError, match=r"over task\.max_prompt_chars 9"):
        LongBench("qasper", data=path, max_prompt_chars=9).examples(0, None)


def test_longbench_from_the_hubs_archive(tmp_path, monkeypatch):
    record = {"input": "", "context": "Text.", "answers": ["x"]}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/gov_report.jsonl", json.dumps(record) + "\n")
    monkeypatch.setattr(
        "retro_jax.experiments.tasks.longbench.fetch", lambda name, files: [tmp_path / files[0]]
    )
    (example,) = LongBench("gov_report").examples(0, None)
    assert example.max_new_tokens == 512
    with pytest.raises(ValueError, match=r"not a zip archive with data/qasper\.jsonl"):
        LongBench("qasper").examples(0, None)


HUB = {  # a record as the hub's parquet files have it, and the question it becomes
    "gsm8k": (
        {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"},
        Question("Two and two?", "1004", "2+2=4"),
    ),
    "mmlu": (
        {"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "set_theory"},
        Question("Which?\n(A) x\n(B) y", "B", subject="set theory"),
    ),
    "commonsenseqa": (
        {"question": "Which?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"},
        Question("Which?\n(A) x\n(B) y", "A"),
    ),
}


@pytest.mark.parametrize("source", HUB)
def test_questions_from_the_hub(source, tmp_path, monkeypatch):
    record, question = HUB[source]
    reader = ModuleType("pyarrow.parquet")
    reader.read_table = lambda path: SimpleNamespace(to_pylist=lambda: json.loads(path.read_text()))
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
    (tmp_path / "stored.parquet").write_text(json.dumps([record]))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: tmp_path / "stored.parquet")
    assert READ[source](None, "test") == [question]


def test_parquet_without_its_reader_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    refused = r"openai/gsm8k/main/train.*parquet is read by pyarrow.*\[hub\].*--task\.data"
    with pytest.raises(ValueError, match=refused):
        LongGenBench().examples(0, None)
    (tmp_path / "test.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.parquet is read by pyarrow .*which is not installed"):
        AIME24(data=tmp_path).examples(0, None)


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        (None, FileNotFoundError, "no file that matches"),
        ("{broken\n", ValueError, "test.jsonl line 1 is not JSON"),
        ('{"question": "x"}\n', ValueError, "record 1 has no 'answer'"),
        ('{"question": "x", "answer": "5"}\n', ValueError, "has no '####'; is this GSM8K"),
        ("", ValueError, "has no records"),
        ("\xff", ValueError, "is not UTF-8"),
    ],
)
def test_wrong_data(gsm8k, contents, error, message):
    (gsm8k / "test.jsonl").unlink()
    if contents is not None:
        (gsm8k / "test.jsonl").write_bytes(contents.encode("latin-1"))
    with pytest.raises(error, match=message):
        LongGenBench(data=gsm8k, n=1, shots=1).examples(0, None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_data_as_programs_save_it(tmp_path, gsm8k, encoding, end):
    wanted = LongGenBench(data=gsm8k, n=1, shots=1).examples(0, None)
    rows = [["Question", *CHOICES], ['"Zo\u00eb, why?"', "right", "x", "y", "z"]]
    (tmp_path / "gpqa_diamond.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    question = GPQA(data=tmp_path).examples(0, None)
    for name in ("train.jsonl", "test.jsonl", "gpqa_diamond.csv"):
        saved = (tmp_path / name).read_text().replace("\n", end)
        (tmp_path / name).write_bytes(saved.encode(encoding))
    assert LongGenBench(data=gsm8k, n=1, shots=1).examples(0, None) == wanted
    assert GPQA(data=tmp_path).examples(0, None) == question


def test_a_table_that_is_none(tmp_path):
    (tmp_path / "gpqa_diamond.csv").write_text("Question\n" + "x" * 200_000)
    with pytest.raises(ValueError, match=r"gpqa_diamond\.csv is not CSV \(field larger than"):
        GPQA(data=tmp_path).examples(0, None)


def test_missing_data(tmp_path, gsm8k):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*correct --task.data"):
        LongGenBench(data=tmp_path / "no").examples(0, None)
    with pytest.raises(ValueError, match=r"7 questions, fewer than the task\.n 8"):
        LongGenBench(data=gsm8k, n=8).examples(0, None)
    with pytest.raises(ValueError, match=r"not one of \.jsonl"):
        AIME24(data=Path(__file__)).examples(0, None)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (LongGenBench("trivia"), "task.source 'trivia' is unknown; use one of gsm8k"),
        (LongGenBench(n=0), "task.n 0 is below 1"),
        (LongBench("trec"), "task.subset 'trec' is unknown"),
        (PG19(tokens=9, prompt_tokens=9), "task.tokens 9 must exceed"),
        (LiveCodeBench(seconds=0), "task.seconds 0 is below 1"),
    ],
)
def test_fields_out_of_range(task, message):
    with pytest.raises(ValueError, match=message):
        task.check()
