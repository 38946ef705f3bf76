"""LongGenBench and reasoning with mixtures of experts, Qwen3-30B-A3B and gpt-oss-20b, on devices of 80 GB.

All weights lie in memory, though a step reads few of them: Qwen3's take 61 GB in bfloat16, gpt-oss's, which
are dequantised from MXFP4, 42 GB. Temperature and top-p are those that the models' authors recommend.
LiveCodeBench runs programs that the model writes only with `--task.execute`.
"""

from retro_jax.experiments.compare.sweep import NAMES
from retro_jax.experiments.io.flags import SamplingFlags
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.aime24 import AIME24
from retro_jax.experiments.tasks.gpqa import GPQA
from retro_jax.experiments.tasks.livecodebench import LiveCodeBench
from retro_jax.experiments.tasks.longgenbench import LongGenBench

_MODELS = {
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", SamplingFlags(temperature=0.6, top_p=0.95), 2),
    "gpt-oss-20b": ("openai/gpt-oss-20b", SamplingFlags(temperature=1.0), 1),
}
_REASONING = (("aime24", AIME24()), ("gpqa", GPQA()), ("livecodebench", LiveCodeBench()))

CONFIGS = {
    f"{name}-longgenbench-gsm8k": RunConfig(
        model=model,
        task=LongGenBench("gsm8k"),
        methods=tuple(NAMES),
        limit=40,
        batch=4,
        model_devices=devices,
        device_gb=80,
    )
    for name, (model, _, devices) in _MODELS.items()
} | {
    f"{name}-{task_name}": RunConfig(
        model=model,
        task=task,
        methods=tuple(NAMES),
        sampling=sampling,
        samples=4,
        batch=4,
        model_devices=devices,
        device_gb=80,
    )
    for name, (model, sampling, devices) in _MODELS.items()
    for task_name, task in _REASONING
}
