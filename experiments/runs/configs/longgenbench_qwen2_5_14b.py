"""LongGenBench with Qwen2.5-14B-Instruct on one device of 80 GB: GSM8K, MMLU and CommonsenseQA.

The paper has n = 15, 30 and 45: pass `--task.n`.
"""

from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.longgenbench import READ, LongGenBench

CONFIGS = {
    f"qwen2.5-14b-longgenbench-{source}": RunConfig(
        model="Qwen/Qwen2.5-14B-Instruct",
        task=LongGenBench(source),
        methods=tuple(NAMES),
        limit=40,
        batch=4,
        device_gb=80,
    )
    for source in READ
}
