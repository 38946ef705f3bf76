"""LongGenBench with Llama-3.1-8B-Instruct on one device of 80 GB: GSM8K, MMLU and CommonsenseQA.

The paper has n = 15, 30 and 45: pass `--task.n`.
"""

from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.longgenbench import READ, LongGenBench

CONFIGS = {
    f"llama3.1-8b-longgenbench-{source}": RunConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        task=LongGenBench(source),
        methods=tuple(NAMES),
        limit=40,
        batch=8,
        device_gb=80,
    )
    for source in READ
}
