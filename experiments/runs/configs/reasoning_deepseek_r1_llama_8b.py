"""AIME 2024, GPQA-Diamond and LiveCodeBench v5 with DeepSeek-R1-Distill-Llama-8B on one device of 80 GB.

Temperature and top-p are those that the model's authors recommend. LiveCodeBench runs programs that the model
writes only with `--task.execute`.
"""

from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.io.flags import SamplingFlags
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.gpqa import GPQA
from retro_jax.experiments.tasks.livecodebench import LiveCodeBench

CONFIGS = {
    f"deepseek-r1-llama-8b-{name}": RunConfig(
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        task=task,
        methods=tuple(NAMES),
        sampling=SamplingFlags(temperature=0.6, top_p=0.95),
        samples=4,
        batch=8,
        device_gb=80,
    )
    for name, task in (("aime24", AIME24()), ("gpqa", GPQA()), ("livecodebench", LiveCodeBench()))
}
