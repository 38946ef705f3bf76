"""Runs of SmolLM2-135M that a CPU can do: books, recall, needles, and LongGenBench's form end to end."""

from retro_jax.experiments.runs.config import CommonFlags, RunConfig
from retro_jax.experiments.tasks.longgenbench import LongGenBench
from retro_jax.experiments.tasks.needles import Needles
from retro_jax.experiments.tasks.pg19 import PG19
from retro_jax.experiments.tasks.recall import Recall

MODEL = "smollm2-135m"
BUDGETS = (128, 256, 512, 0.15)
DECODE = CommonFlags(budget_floor=64)

CONFIGS = {
    "smollm2-pg19": RunConfig(
        model=MODEL,
        task=PG19(),
        methods=("full", "quest", "retro", "streaming", "tova"),
        windows=(2, 4, 8),
        budgets=BUDGETS,
        decode=DECODE,
        batch=2,
        dtype="float32",
    ),
    "smollm2-recall": RunConfig(
        model=MODEL,
        task=Recall(pairs=60, questions=30, count=20),
        methods=("full", "quest", "retro", "streaming", "tova", "h2o"),
        windows=(2, 4, 8),
        budgets=(128, 256, 512),
        batch=4,
        dtype="float32",
    ),
    "smollm2-needles": RunConfig(
        model=MODEL, task=Needles(words=600), budgets=(128, 256, 512), batch=4, dtype="float32"
    ),
    "smollm2-longgenbench": RunConfig(
        model=MODEL,
        task=LongGenBench(n=4, shots=2, tokens_per_answer=96),
        methods=("full", "quest", "retro", "streaming"),
        budgets=(256,),
        limit=8,
        batch=4,
        dtype="float32",
    ),
}
