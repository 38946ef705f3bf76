import base64
import json
import pickle
import zlib

import pytest

from retro_jax.experiments.tasks.livecodebench import LiveCodeBench, program, same_output
from retro_jax.experiments.tasks.sandbox import run_python


def write_problem(path, **changes):
    path.write_text(json.dumps(a_problem(**changes)) + "\n")
    return path


def a_problem(**changes):
    hidden = json.dumps([{"input": "4\n", "output": "8\n", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    return {
        "question_id": "abc",
        "question_content": "Double it.",
        "public_test_cases": json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
        "private_test_cases": packed,
        "metadata": "{}",
        "starter_code": "",
    } | changes


def reply(code):
    return f"<think>```python\nwrong\n```</think>Here:\n```python\n{code}\n```"


def test_livecodebench(tmp_path):
    path = write_problem(tmp_path / "test5.jsonl")
    task = LiveCodeBench(data=path, execute=True, seconds=5)
    (example,) = task.examples(0, None)
    assert len(json.loads(example.answers[0])["cases"]) == 2
    assert task.grade(example, reply("print(2 * int(input()))")) == [1.0]
    assert task.grade(example, reply("print(6)")) == [0.0]  # fails the hidden test
    assert task.grade(example, "no code") == [0.0]
    assert LiveCodeBench(data=path).grade(example, reply("print(6)")) == []  # off by default


@pytest.fixture
def grade(tmp_path):
    """Grades code by one test, of standard input or of a function that is called `scale`."""

    def run(code, given, wanted, function=False):
        cases = [{"input": given, "output": wanted, "testtype": "functional" if function else "stdin"}]
        changes = {"metadata": '{"func_name": "scale"}', "starter_code": "class"} if function else {}
        path = write_problem(
            tmp_path / "x.jsonl", public_test_cases=json.dumps(cases), private_test_cases="[]", **changes
        )
        task = LiveCodeBench(data=path, execute=True)
        (example,) = task.examples(0, None)
        return task.grade(example, reply(code))

    return run


SCALE = "class Solution:\n  def scale(self, a: List[int], k) -> Any:\n    "


@pytest.mark.parametrize(
    ("body", "score"),
    [
        ("print('noise'); return [k * x for x in a]", 1),  # List and Any are there without an import
        ("return tuple(k * x for x in a)", 1),
        ("return [x for x in a]", 0),
        ("heapify(a); return [k * heappop(a), k * math.gcd(heappop(a), 2)]", 1),
        ("f = lambda n: n and f(n - 1)\n    return [f(3000) + k * x for x in a]", 1),
        (f"return [k * x for x in a]\nif __name__ == '__main__':\n  print({'Solution().scale()'})", 1),
        ("print('the result is equal to the expected one'); return 1", 0),
        ("return [k * x for x in a] if k != 3 else exit()", 0),
    ],
)
def test_functions(grade, body, score):
    assert grade(SCALE + body, "[1, 2]\n3", "[3, 6]", function=True) == [score]


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("n = int(input())\nheap = [n]\nheapify(heap)\nprint(pow(heap[0], 2, 10))", 1),  # not math.pow
        ("f = lambda n: n and f(n - 1)\nprint(f(3000) + int(input()) ** 2 % 10)", 1),
        ("if __name__ == '__main__':\n  print(sys.stdin.readline().strip() and 6)\n  sys.exit(1)", 1),
        ("print(6)\nraise ValueError", 0),
    ],
)
def test_programs_that_read_standard_input(grade, code, score):
    assert grade(code, "4\n", "6") == [score]


def test_hidden_tests_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    path = write_problem(tmp_path / "x.jsonl", private_test_cases=packed)
    with pytest.raises(ValueError, match=r"problem abc has tests that cannot be read .*is no string"):
        LiveCodeBench(data=path).examples(0, None)


@pytest.mark.parametrize("stored", ["!", "aGVsbG8=", base64.b64encode(zlib.compress(b"x")).decode(), "[1"])
def test_damaged_hidden_tests(tmp_path, stored):
    path = write_problem(tmp_path / "x.jsonl", private_test_cases=stored)
    with pytest.raises(ValueError, match="problem abc has tests that cannot be read"):
        LiveCodeBench(data=path).examples(0, None)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```\na\n``` text\n```py\nb\nc\n```", "b\nc"),
        ("```text\nnot this\n```\nnor this\n  ```python\n  b\n  ```\n", "  b"),
        ("none", None),
        ("```python\ncut off", None),
    ],
)
def test_code_stands_between_the_last_fences(text, code):
    assert program(text) == code


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("1 2.0\n3\n", " 1 2\n3", True),
        ("1e3", "1000.0", True),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("1\n2", "1 2", False),
        ("0.1000000001", "0.1", False),
        ("50000000000000001", "50000000000000000", False),
        ("x", "1", False),
        ("", "", True),
    ],
)
def test_outputs_are_compared_as_by_the_original(printed, wanted, same):
    assert same_output(printed, wanted) == same


def test_sandbox(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run_python("print(input() + '!')", "hi", 5, 1000) == "hi!\n"
    assert run_python("import os; print(os.environ.get('SECRET'), os.listdir('.'))", "", 5, 1000) == (
        "None ['program.py']\n"
    )
    assert run_python("print(1); raise SystemExit(3)", "", 5, 1000) == "1\n"
    assert run_python("print(1); raise ValueError", "", 5, 1000) is None
    assert run_python("while True: pass", "", 0.5, 1000) is None
    assert run_python("x = bytearray(10**9); print('got it')", "", 5, 500) is None
    assert run_python("open('f', 'wb').write(b'x' * 10**8)", "", 5, 1000) is None
    assert run_python("import sys; print(sys.flags.isolated, sys.argv)", "", 5, 1000).startswith("1 ['/")
