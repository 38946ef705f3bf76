"""What CONTRIBUTING says of a new task: with a class and a line in `TASKS` it has plan, folder and report."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from retro_jax import Sampling
from retro_jax.experiments.report.data import read_run
from retro_jax.experiments.report.page import make_page
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.folder import RunFolder, run_identity
from retro_jax.experiments.runs.plan import make_plan
from retro_jax.experiments.runs.work import decode_batch, encode
from retro_jax.experiments.tasks import TASKS, Example, Nominal, Task
from retro_jax.models.presets import SIZES


@dataclass(frozen=True)
class Sums(Task):
    """Sums of two digits."""

    metric: ClassVar[str] = "sums right"

    data: Path | None = None
    count: int = 3
    local: ClassVar[bool] = True

    def nominal(self):
        return Nominal(self.count, 8, 4)

    def examples(self, seed, limit):
        return [
            Example(id=f"sum-{n}", prompt=f"{n} + {n} =", answers=(str(2 * n),), max_new_tokens=4)
            for n in range(self.count)
        ][:limit]

    def grade_reply(self, example, reply):
        return [float(reply.strip() == example.answers[0])]


def test_a_task_is_a_class_and_a_line(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "sums", Sums)
    config = RunConfig(model="random:tiny", task=Sums(count=2), methods=("full", "quest"), budgets=(128,))
    plan = make_plan(config)
    assert (plan.examples, plan.exact, list(plan.caches)) == (2, True, ["full", "quest-b128"])
    tokenizer = SimpleNamespace(
        chat_template=None,
        encode=lambda text: list(map(ord, text)),
        decode=lambda ids: "".join(map(chr, ids)),
    )
    model = SimpleNamespace(tokenizer=tokenizer, config=SIZES["tiny"])
    made = SimpleNamespace(tokens=[[ord("2")]], finished=[False], metrics=None)
    monkeypatch.setattr("retro_jax.experiments.runs.work.generate", lambda *_, **__: made)
    identity = run_identity("toy", config.identity(), config.configurations(), "digest")
    with RunFolder(tmp_path / "run", identity) as folder:
        for example in config.task.examples(0, None):
            rows = [encode(tokenizer, example)]
            (found,) = decode_batch(model, None, config.task, rows, 1, Sampling(), None)
            folder.append([{"example": example.id, "method": "full", "sample": 0} | found])
    run = read_run(tmp_path / "run")
    assert run.by_example("full") == {"sum-0": 0.0, "sum-1": 1.0}
    assert "sums right" in make_page([run], "page")[0]
