"""LiveCodeBench v5 (Jain et al., arXiv 2403.07974; CC): write a program, which is run against hidden tests.

Data: the benchmark's .jsonl files, from the hub livecodebench/code_generation_lite; by default test5.jsonl,
the problems that version 5 added. Programs are run only if `execute` is set (see `sandbox`); else the run
keeps the texts and scores nothing.

As in the original harness, the code is what stands between the last two fences; it finds `MODULES` imported,
by name and with all their names, and may recurse 50,000 deep; to exit, with whatever status, is no failure;
lines of output are the same if they are so without surrounding spaces, or are equal as decimal numbers; a
function's result is compared as a value, a tuple as a list. Differences from the original: the wording of the
prompt; reasoning is never searched for code; each test has a process of its own, whereas the original runs
all in one, with `open` and `sys.stdin` replaced, so that programs which keep state, start threads or read
`sys.stdin.buffer` can fare otherwise; memory is limited.
"""

import base64
import io
import json
import pickle
import secrets
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import ClassVar

from retro_jax.experiments.tasks.base import Example, Nominal, Task, check_at_least
from retro_jax.experiments.tasks.sandbox import run_python
from retro_jax.experiments.tasks.sources import fetch, find, records

FIELDS = ("question_id", "question_content", "public_test_cases", "private_test_cases")
MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
"""What the original harness imports before each program, as sites that judge programs do."""
_IMPORTS = "\n".join(
    [
        *(f"from {module} import *" for module in [*MODULES, "builtins", "typing"]),  # builtins hide math.pow
        *(f"import {module}" for module in MODULES),
        "sys.setrecursionlimit(50_000)",
        "sys.set_int_max_str_digits(50_000)",
    ]
)


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
        if not function:
            printed = run_python(f"{_IMPORTS}\n{code}", test["input"], self.seconds, self.memory_mb)
            return printed is not None and same_output(printed, test["output"])
        right = secrets.token_hex()  # which the solution cannot print by chance
        source = _caller(code, function, test["output"], right)
        printed = run_python(source, test["input"], self.seconds, self.memory_mb)
        return printed is not None and printed.splitlines()[-1:] == [right]


def program(reply: str) -> str | None:
    """The code between the last two lines of a reply that have three backticks, None without two."""
    lines = reply.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs are the same line by line, without surrounding spaces or as decimal numbers."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, wanted))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return [Decimal(word) for word in one.split()] == [Decimal(word) for word in other.split()]
    except InvalidOperation:
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
    try:
        cases = json.loads(record["public_test_cases"]) + _private(record["private_test_cases"])
        metadata = json.loads(record.get("metadata") or "{}")
    except (ValueError, LookupError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        raise ValueError(
            f"problem {record['question_id']} has tests that cannot be read ({error})"
        ) from error
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


def _caller(code: str, function: str, wanted: str, right: str) -> str:
    """Source that calls a solution's function and prints `right` if its result is `wanted`, as JSON.

    It reads the arguments from stdin, one JSON value a line. The solution is no main program, as for the
    original: an example of its use under `__main__` is not run.
    """
    return f"""
import json, sys, types
solution = types.ModuleType("solution")
exec(compile({f"{_IMPORTS}\n{code}"!r}, "solution.py", "exec"), solution.__dict__)
owner = solution.Solution() if hasattr(solution, "Solution") else solution
result = getattr(owner, {function!r})(*map(json.loads, sys.stdin.read().strip().split("\\n")))
result = list(result) if isinstance(result, tuple) else result
sys.stdout = sys.__stdout__
print("\\n" + {right!r} * (result == json.loads({wanted!r})))
"""
