"""LongBench, three subsets, with Llama-3.1-8B-Instruct on one device of 80 GB."""

from experiments.run_config import RunConfig
from experiments.sweep import NAMES
from experiments.tasks.longbench import LongBench

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
