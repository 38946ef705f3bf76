"""Tasks, one file each: prompt, generation limit, answer extraction, metric, and where the data comes from.

A task is a frozen dataclass with the members of `base.Task` and a line in `TASKS`; its fields are flags of
`retro-jax run`, and `tests/experiments/test_tasks.py` picks it up from there. Data is read from `data`, a
local file or folder, else fetched from the Hugging Face hub; each file says which and under what licence.
"""

from collections.abc import Mapping
from typing import Union

from experiments.tasks.aime24 import AIME24
from experiments.tasks.base import Asked, Example, Nominal, Passage, Task, describe
from experiments.tasks.gpqa import GPQA
from experiments.tasks.livecodebench import LiveCodeBench
from experiments.tasks.longbench import LongBench
from experiments.tasks.longgenbench import LongGenBench
from experiments.tasks.needles import Needles
from experiments.tasks.pg19 import PG19
from experiments.tasks.recall import Recall

TASKS: Mapping[str, type] = {
    "aime24": AIME24,
    "gpqa": GPQA,
    "livecodebench": LiveCodeBench,
    "longbench": LongBench,
    "longgenbench": LongGenBench,
    "needles": Needles,
    "pg19": PG19,
    "recall": Recall,
}

AnyTask = Union[tuple(TASKS.values())]  # noqa: UP007 (made from the registry)
"""Any of `TASKS`, for flags."""

__all__ = ["TASKS", "AnyTask", "Asked", "Example", "Nominal", "Passage", "Task", "describe"]
