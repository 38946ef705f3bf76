"""One evaluation by the harness, and what is kept and shown of it."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retro_jax.experiments.io.estimates import Estimate
from retro_jax.experiments.io.tables import markdown, number
from retro_jax.models.names import nearest

if TYPE_CHECKING:
    from lm_eval.api.model import LM

KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "configs",
)
"""What is kept of what lm-eval tells, beside the answers."""
NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def check_installed() -> None:
    """Raises ValueError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks are read by lm-eval, which is not installed: run `python -m pip install "
            "'retro-jax[lm-eval]'`, or `python -m pip install lm-eval`"
        )


@dataclass(frozen=True)
class Asked:
    """What is evaluated.

    Attributes:
      tasks: names that lm-eval knows, tasks, groups or tags, or .yaml files in its format.
      include_path: a folder with further tasks.
      num_fewshot: examples before each question; None: the task's own number.
      limit: only so many questions of each task, or below 1 such a share; None: all.
      chat_template: questions are a user's messages.
      system: the system message, or the text before all else; None: none.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    chat_template: bool = False
    system: str | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("there is nothing to evaluate; name --tasks, such as hellaswag or my_task.yaml")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"--limit {self.limit} must be above 0; leave it out for all questions")
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise ValueError(f"--limit {self.limit} must be a whole number, or below 1 for a share")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot {self.num_fewshot} must be 0 or more")
        if self.include_path is not None and not self.include_path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.include_path}; correct --include-path")
        for task in self.tasks:
            if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
                raise FileNotFoundError(f"there is no file {task}; correct --tasks")


def evaluate(model: "LM", asked: Asked) -> tuple[dict, dict[str, bytes]]:
    """Evaluates a model.

    Returns:
      What `KEPT` names, as JSON values, and a file of JSON lines of each task's answers, by its name.

    Raises:
      ValueError: a task is unknown.
      OSError: its data cannot be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, sanitize_task_name

    files = [task for task in asked.tasks if task.endswith((".yaml", ".yml"))]
    # To know lm-eval's own tasks takes it seconds.
    own = len(files) < len(asked.tasks)
    manager = TaskManager(
        include_path=None if asked.include_path is None else str(asked.include_path), include_defaults=own
    )
    for task in asked.tasks:
        if task not in files and not manager.match_tasks([task]):
            raise ValueError(
                f"task {task!r} is unknown{nearest(task, manager.all_tasks)}; `lm-eval ls tasks` lists those "
                "of lm-eval, --include-path adds a folder of others, and a .yaml file is a task too"
            )
    names = [
        name for task in asked.tasks for name in ([task] if task in files else manager.match_tasks([task]))
    ]
    found = simple_evaluate(
        model=model,
        tasks=list(dict.fromkeys(names)),
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        task_manager=manager,
        apply_chat_template=asked.chat_template,
        fewshot_as_multiturn=asked.chat_template,
        system_instruction=asked.system,
    )
    found = json.loads(json.dumps(found, default=handle_non_serializable))
    answers = {}
    for task, lines in found["samples"].items():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        answers[f"answers_{sanitize_task_name(task)}.jsonl"] = text.encode()
    return {name: found[name] for name in KEPT if name in found}, answers


def table(found: Mapping) -> str:
    """Returns a table of an evaluation's metrics, with their standard errors.

    Args:
      found: from `evaluate`.
    """
    header, body = ["task", "filter", "metric", "value", "n", "few-shot"], []
    for name, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, of = key.partition(",")
            if metric in NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{of}")
            error = float(error) if isinstance(error, int | float) else 0.0
            counts = found["n-samples"].get(name, {})
            body.append(
                [
                    name,
                    of,
                    metric,
                    number(Estimate(float(value), error)),
                    str(counts.get("effective", "")),
                    str(found["n-shot"].get(name, "")),
                ]
            )
    return markdown(header, body)
