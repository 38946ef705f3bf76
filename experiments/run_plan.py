"""What a run takes: examples, tokens, steps, and memory by device, before anything is loaded or compiled."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType

from experiments.results import read_json
from experiments.run_config import RunConfig
from experiments.run_work import capacity_for
from experiments.tables import markdown
from experiments.tasks import Asked, Passage, describe
from models.config import ModelConfig
from models.huggingface import config_from_json
from models.presets import SIZES
from pallas_kernels.dispatch import HEADS, SEQUENCES
from retro_jax import DecodeConfig
from retro_jax.sharding import abstract_arguments

CHARS_PER_TOKEN = 3
"""A cautious figure for estimates without a tokenizer: English text has about 4, digits fewer."""


@dataclass(frozen=True)
class Plan:
    """What a run takes; tokens are estimates from characters.

    Attributes:
      examples: how many.
      exact: whether they were counted; else they are the published numbers, as the data is not at hand.
      batches: of each method.
      prompt_tokens: of the longest prompt.
      new_tokens: that a reply may take.
      steps: decode steps of each method, at most.
      prefill_tokens: tokens of all prompts of each method.
      capacity: tokens per sequence of the longest batch's cache, None where the model's size is not known.
      weights: bytes on each device, None as above.
      caches: bytes on each device by method, empty as above.
    """

    examples: int
    exact: bool
    batches: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    prefill_tokens: int
    capacity: int | None
    weights: int | None
    caches: Mapping[str, int]


def make_plan(config: RunConfig) -> Plan:
    """Estimates what a run takes; reads local data, and nothing from the network.

    Raises:
      ValueError: the examples do not fit the model's positions, its heads not the mesh, or weights and cache
        not the devices that the run is meant for.
    """
    task = config.task
    if task.local:
        found = task.examples(config.sampling.seed, config.limit)
        prompts = [
            example.prompt_tokens if isinstance(example, Passage) else len(example.prompt) // CHARS_PER_TOKEN
            for example in found
        ]
        news = [
            sum(map(len, example.cues + example.answers)) // CHARS_PER_TOKEN
            if isinstance(example, Asked)
            else example.max_new_tokens
            for example in found
        ]
        examples, longest, new, prefill = len(found), max(prompts), max(news), sum(prompts)
    else:
        nominal = task.nominal()
        examples = min(nominal.examples, config.limit or nominal.examples)
        longest, new = nominal.prompt_chars // CHARS_PER_TOKEN, nominal.new_tokens
        prefill = examples * longest
    batches = -(-examples * config.samples // config.batch)
    model = known_model(config.model, config.dtype)
    capacity, weights, caches = None, None, {}
    if model:
        if longest + new > model.max_positions:
            raise ValueError(
                f"an example takes about {longest + new} positions, {model.name} has {model.max_positions}; "
                "make the task's examples or replies shorter"
            )
        capacity = capacity_for(model, longest + new)
        weights, caches = memory(config, model, capacity)
        if config.device_gb:
            held = weights + max(caches.values())
            check_fits("weights and cache take", held, "--device-gb", config.device_gb * 1e9)
    return Plan(
        examples=examples,
        exact=task.local,
        batches=batches,
        prompt_tokens=longest,
        new_tokens=new,
        steps=batches * new,
        prefill_tokens=prefill * config.samples,
        capacity=capacity,
        weights=weights,
        caches=caches,
    )


def known_model(name: str, dtype: str | None) -> ModelConfig | None:
    """A model's sizes without fetching it: of a preset, a local folder, or a hub model of a known size."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return config_from_json(read_json(path / "config.json", "fetch the model again"), name, dtype)
    size = name.removeprefix("random:").rpartition("/")[2].lower().removesuffix("-instruct")
    found = SIZES.get(size) or SIZES.get(size.replace("llama-", "llama", 1).removeprefix("meta-"))
    return found and replace(found, name=name, dtype=dtype or found.dtype)


def memory(config: RunConfig, model: ModelConfig, capacity: int) -> tuple[int, dict[str, int]]:
    """Bytes of weights, and of each method's decode state, on each device.

    Raises:
      ValueError: the mesh does not divide the batch, the heads or the widths.
    """
    sizes = config.data_devices, config.model_devices
    mesh = AbstractMesh(sizes, (SEQUENCES, HEADS), axis_types=(AxisType.Auto,) * 2)
    caches = {}
    for label, decode in config.configurations().items():
        params, state = abstract_arguments(model, decode, mesh, config.batch, capacity)
        caches[label] = _device_bytes(state)
    return _device_bytes(params), caches


def check_memory(plan: Plan) -> None:
    """Raises ValueError if weights and cache are larger than a device's memory."""
    limit = device_memory()
    if plan.weights is None or limit is None:
        return
    check_fits("weights and cache take", plan.weights + max(plan.caches.values()), "its", limit)


def check_fits(what: str, needed: int, name: str, limit: float) -> None:
    """Raises ValueError if `what` takes more bytes of a device than a limit of this name."""
    if needed > limit:
        raise ValueError(
            f"{what} {gigabytes(needed)} on each device, over {name} {gigabytes(limit)}; use more devices "
            "(--model-devices, --data-devices), a smaller --batch, or another --dtype"
        )


def device_memory() -> int | None:
    """Bytes of memory of the first device; of the machine for a CPU, None where it cannot be told."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def plan_values(config: RunConfig, plan: Plan) -> dict:
    """The plan as JSON values."""
    return {"config": config.identity(), "methods": list(config.configurations()), "plan": asdict(plan)}


def plan_text(config: RunConfig, plan: Plan, configs: Mapping[str, DecodeConfig]) -> str:
    """The plan in words and a table."""
    kind = "made or read" if plan.exact else "as published; the data is not at hand"
    devices = config.data_devices * config.model_devices
    weights = "size not known" if plan.weights is None else f"{gigabytes(plan.weights)} on each device"
    lines = [
        f"model     {config.model}, {devices} device{'s' * (devices > 1)} "
        f"({config.data_devices} for the batch x {config.model_devices} for heads)",
        f"task      {describe(config.task)}",
        f"examples  {plan.examples} ({kind}), {config.samples} "
        f"repl{'y' if config.samples == 1 else 'ies'} each, "
        f"in {plan.batches} batches of {config.batch}",
        f"length    prompts of up to about {plan.prompt_tokens} tokens, replies of up to {plan.new_tokens}",
        f"weights   {weights}",
        "",
    ]
    body = [
        [
            label,
            str(plan.prefill_tokens),
            str(plan.steps),
            gigabytes(plan.caches[label]) if plan.caches else "",
            gigabytes(plan.caches[label] + plan.weights) if plan.caches else "",
        ]
        for label in configs
    ]
    header = ["method", "prompt tokens", "decode steps at most", "cache per device", "with weights"]
    return "\n".join([*lines, markdown(header, body)])


def gigabytes(size: float) -> str:
    """A number of bytes in GB."""
    return f"{size / 1e9:.2f} GB"


def _device_bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
