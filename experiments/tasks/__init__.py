"""Tasks, one file each: prompt, generation limit, answer extraction, metric, and where the data comes from.

A task is a frozen dataclass with the members of `base.Task` and a line in `TASKS`; its fields are flags of
`retro-jax run`, and `tests/experiments/tasks/test_tasks.py` picks it up from there. Data is read from `data`,
a local file or folder, else fetched from the Hugging Face hub; each file says which and under what licence.
"""

from collections.abc import Mapping
from typing import Union

from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.base import Asked, Example, Filled, Nominal, Passage, Task, describe
from retro_jax.experiments.tasks.gpqa import GPQA
from retro_jax.experiments.tasks.livecodebench import LiveCodeBench
from retro_jax.experiments.tasks.longbench import LongBench
from retro_jax.experiments.tasks.longgenbench import LongGenBench
from retro_jax.experiments.tasks.needles import Needles
from retro_jax.experiments.tasks.pg19 import PG19
from retro_jax.experiments.tasks.recall import Recall
from retro_jax.experiments.tasks.ruler import RULER

TASKS: Mapping[str, type] = {
    "aime24": AIME24,
    "gpqa": GPQA,
    "livecodebench": LiveCodeBench,
    "longbench": LongBench,
    "longgenbench": LongGenBench,
    "needles": Needles,
    "pg19": PG19,
    "recall": Recall,
    "ruler": RULER,
}

AnyTask = Union[tuple(TASKS.values())]  # noqa: UP007 (made from the registry)
"""Any of `TASKS`, for flags."""

__all__ = ["TASKS", "AnyTask", "Asked", "Example", "Filled", "Nominal", "Passage", "Task", "describe"]
