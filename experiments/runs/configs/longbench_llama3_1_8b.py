"""LongBench, three subsets, with Llama-3.1-8B-Instruct on one device of 80 GB."""

from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.longbench import LongBench

CONFIGS = {
    f"llama3.1-8b-longbench-{subset}": RunConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        task=LongBench(subset),
        methods=tuple(NAMES),
        batch=2,
        device_gb=80,
    )
    for subset in ("hotpotqa", "qasper", "passage_retrieval_en")
}
