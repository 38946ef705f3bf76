"""RULER by length: Llama-3.1-8B-Instruct on one device of 80 GB, and SmolLM2-135M-Instruct on a CPU.

What compresses prompts runs beside what selects pages. Questions need data (see the task), so the runs of
SmolLM2 leave them out. Other lengths are `--task.length`, more budgets `--budgets`.
"""

from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks.ruler import RULER
from retro_jax.experiments.tasks.ruler.task import MADE_BY_CODE

METHODS = ("full", "quest", "snapkv", "expected")
PRESETS = ("paper", "mean-key")

CONFIGS = {
    f"llama3.1-8b-ruler-{thousands}k": RunConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        task=RULER(length=1024 * thousands),
        methods=METHODS,
        presets=PRESETS,
        batch=1 if thousands > 32 else 4,
        device_gb=80,
    )
    for thousands in (4, 32, 128)
} | {
    f"smollm2-ruler-{thousands}k": RunConfig(
        model="smollm2-135m",
        task=RULER(MADE_BY_CODE, length=1024 * thousands, count=10),
        methods=METHODS,
        presets=PRESETS,
        budgets=(256,),
        batch=2,
        dtype="float32",
    )
    for thousands in (1, 2, 4, 8)
}
