"""LiveCodeBench v5 (Jain et al., arXiv 2403.07974; CC): write a program, which is run against hidden tests.

Data: the benchmark's .jsonl files, from the hub livecodebench/code_generation_lite; by default test5.jsonl,
the problems that version 5 added. Programs are run only if `execute` is set (see `sandbox`); else the run
keeps the texts and scores nothing. Differences from the original: the wording of the prompt; outputs are
compared word by word, with numbers as numbers.
"""

import base64
import io
import json
import pickle
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.tasks.base import Example, Nominal, Task, check_at_least
from experiments.tasks.sandbox import run_python
from experiments.tasks.sources import fetch, find, records

FIELDS = ("question_id", "question_content", "public_test_cases", "private_test_cases")


@dataclass(frozen=True)
class LiveCodeBench(Task):
    """LiveCodeBench v5, code generation; pass@1 is the mean over several sampled replies."""

    metric: ClassVar[str] = "pass@1"

    data: Path | None = None
    """A .jsonl file, or a folder with them; None: from the hub."""
    max_new_tokens: int = 32768
    """The reply's limit, reasoning included."""
    execute: bool = False
    """Run the programs that the model writes, in processes with limits and without network where possible."""
    seconds: float = 6.0
    """Limit of each test."""
    memory_mb: int = 4096
    """Limit of each test."""

    @property
    def local(self) -> bool:
        """Whether `examples` reads nothing from the network."""
        return self.data is not None

    def check(self) -> None:
        """Raises ValueError if a field is out of its range."""
        check_at_least(self, 1, "max_new_tokens", "seconds", "memory_mb")

    def nominal(self) -> Nominal:
        """What the task takes as published."""
        return Nominal(167, 1800, self.max_new_tokens)

    def examples(self, seed: int, limit: int | None) -> list[Example]:
        """The problems in the order of the files; `answers` holds the tests, as JSON."""
        paths = (
            find(self.data, ["test5.jsonl", "*.jsonl"])
            if self.data
            else fetch("livecodebench/code_generation_lite", ["test5.jsonl"])
        )
        found = [record for path in paths for record in records(path, FIELDS)][:limit]
        return [
            Example(
                id=f"livecodebench-{record['question_id']}",
                prompt=_prompt(record),
                answers=(json.dumps(_tests(record)),),
                max_new_tokens=self.max_new_tokens,
                chat=True,
            )
            for record in found
        ]

    def grade_reply(self, example: Example, reply: str) -> list[float]:
        """1 if the program passes every test, else 0; nothing where programs are not run."""
        if not self.execute:
            return []
        code, tests = program(reply), json.loads(example.answers[0])
        if code is None:
            return [0.0]
        return [float(all(self._passes(code, test, tests["function"]) for test in tests["cases"]))]

    def _passes(self, code: str, test: dict, function: str | None) -> bool:
        source = f"{code}\n{_call(function)}" if function else code
        printed = run_python(source, test["input"], self.seconds, self.memory_mb)
        if printed is None:
            return False
        if not function:
            return same_output(printed, test["output"])
        try:
            return json.loads(printed.splitlines()[-1]) == json.loads(test["output"])
        except (ValueError, IndexError):
            return False


def program(text: str) -> str | None:
    """The last block of code in a reply, after the reasoning."""
    reply = text.rpartition("</think>")[2]
    blocks = re.findall(r"```(?:[Pp]y(?:thon)?3?)?[^\S\n]*\n(.*?)```", reply, re.DOTALL)
    return blocks[-1] if blocks else None


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs have the same words line by line, numbers compared as numbers."""
    ours, theirs = (
        [line.split() for line in text.strip().splitlines() if line.strip()] for text in (printed, wanted)
    )
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return abs(float(one) - float(other)) <= 1e-9 * max(1.0, abs(float(other)))
    except ValueError:
        return False


def _prompt(record: dict) -> str:
    start = record.get("starter_code")
    how = (
        f"Complete this code:\n```python\n{start}\n```"
        if start
        else "The program reads its input from standard input and prints the answer."
    )
    ask = "Write a Python program that solves the problem, and give it as one block of code at the end."
    return f"{ask}\n\n{record['question_content'].strip()}\n\n{how}"


def _tests(record: dict) -> dict:
    cases = json.loads(record["public_test_cases"]) + _private(record["private_test_cases"])
    metadata = json.loads(record.get("metadata") or "{}")
    return {"cases": cases, "function": metadata.get("func_name")}


def _private(stored: str) -> list[dict]:
    """The hidden tests: JSON, or JSON in a pickled string that is compressed and in base64."""
    try:
        return json.loads(stored)
    except ValueError:
        return json.loads(_Strings(zlib.decompress(base64.b64decode(stored))).load())


class _Strings(pickle.Unpickler):
    """Reads pickled strings, and nothing that could run code."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} is no string")


def _call(function: str) -> str:
    """Source that calls a solution's function with the arguments on stdin, one JSON value a line."""
    return (
        "import json as _json, sys as _sys\n"
        "_arguments = [_json.loads(line) for line in _sys.stdin.read().splitlines() if line.strip()]\n"
        f"_owner = Solution() if 'Solution' in globals() else None\n"
        f"_call = getattr(_owner, {function!r}) if _owner else globals()[{function!r}]\n"
        "print('\\n' + _json.dumps(_call(*_arguments)))\n"
    )
