"""Perplexity along PG-19's books with Llama-3.1-8B-Instruct on one device of 80 GB; see `--task.data`."""

from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.pg19 import PG19

CONFIGS = {
    "llama3.1-8b-pg19": RunConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        task=PG19(tokens=16384),
        methods=("full", "quest", "retro", "streaming", "tova"),
        windows=(2, 4, 8),
        batch=4,
        device_gb=80,
    )
}
