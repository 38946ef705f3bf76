"""What a run takes: examples, tokens, steps, and memory by device, before anything is loaded or compiled."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from retro_jax import DecodeConfig
from retro_jax.experiments.io.models import known_model
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.machine.memory import check_memory, gigabytes, memory
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.tasks import Asked, Example, Filled, Passage, describe
from retro_jax.models.config import ModelConfig
from retro_jax.sizes import cache_capacity

CHARS_PER_TOKEN = 3
"""A cautious figure for estimates without a tokenizer: English text has about 4, digits fewer."""


@dataclass(frozen=True)
class Plan:
    """What a run takes; tokens are estimates from characters.

    Attributes:
      examples: how many.
      exact: whether they were counted; else they are the published numbers, as the data is not at hand.
      forced: whether replies are given and decoded along, not generated.
      batches: of each method; where sequences come and go, as many as if they did not.
      prompt_tokens: of the longest prompt.
      new_tokens: that a reply may take.
      positions: that the longest example takes, its reply included.
      steps: decode steps of each method, at most.
      prefill_tokens: tokens of all prompts of each method.
      capacity: tokens per sequence of the longest batch's cache, None where the model's size is not known.
      weights: bytes on each device, None as above.
      caches: bytes on each device by method, empty as above.
    """

    examples: int
    exact: bool
    forced: bool
    batches: int
    prompt_tokens: int
    new_tokens: int
    positions: int
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
        prompts, news = zip(*map(_tokens, found), strict=True)
        examples, longest, new, prefill = len(found), max(prompts), max(news), sum(prompts)
        forced = any(isinstance(example, Asked | Passage) for example in found)
        positions = max(map(sum, zip(prompts, news, strict=True)))
        limits = Counter(example.max_new_tokens for example in found).values()
    else:
        nominal = task.nominal()
        examples, forced = min(nominal.examples, config.limit or nominal.examples), nominal.forced
        longest, new = nominal.prompt_chars // CHARS_PER_TOKEN, nominal.new_tokens
        prefill, positions, limits = examples * longest, longest + new, [examples]
    batches = sum(-(-count * config.samples // config.batch) for count in limits)
    model = known_model(config.model, config.dtype)
    capacity, weights, caches = None, None, {}
    if model:
        if positions > model.max_positions:
            raise ValueError(
                f"an example takes about {positions} positions, {model.name} has {model.max_positions}; "
                "make the task's examples or replies shorter"
            )
        capacity = cache_capacity(positions, model.max_positions)
        rows, devices = config.rows(forced), (config.data_devices, config.model_devices)
        parts = {
            label: memory(model, decode, rows, capacity, *devices)
            for label, decode in config.configurations().items()
        }
        weights = next(iter(parts.values())).weights
        caches = {label: part.state for label, part in parts.items()}
        if config.device_gb:
            held = weights + max(caches.values())
            check_fits("weights and cache take", held, "--device-gb", config.device_gb * 1e9)
    return Plan(
        examples=examples,
        exact=task.local,
        forced=forced,
        batches=batches,
        prompt_tokens=longest,
        new_tokens=new,
        positions=positions,
        steps=batches * new,
        prefill_tokens=prefill * config.samples,
        capacity=capacity,
        weights=weights,
        caches=caches,
    )


def _tokens(example: Example) -> tuple[int, int]:
    """Tokens of an example's prompt and of its reply, by its characters unless it says how many."""
    if isinstance(example, Filled):
        return example.length - example.max_new_tokens, example.max_new_tokens
    if isinstance(example, Passage):
        return example.prompt_tokens, example.max_new_tokens
    prompt = len(example.prompt) // CHARS_PER_TOKEN
    if isinstance(example, Asked):
        return prompt, sum(map(len, example.cues + example.answers)) // CHARS_PER_TOKEN
    return prompt, example.max_new_tokens


def check_memory_of(
    config: RunConfig, model: ModelConfig, tokens: int, forced: bool, loaded: bool = False
) -> None:
    """Raises ValueError if the run does not fit the memory that this machine's devices have left.

    Args:
      config: the run.
      model: its model's configuration.
      tokens: of the longest row.
      forced: whether replies are given.
      loaded: whether the weights lie in memory already.
    """
    check_memory(
        model,
        list(config.configurations().values()),
        config.rows(forced),
        cache_capacity(tokens, model.max_positions),
        loaded=loaded,
        data_devices=config.data_devices,
        model_devices=config.model_devices,
    )


def check_fits(what: str, needed: int, name: str, limit: float) -> None:
    """Raises ValueError if `what` takes more bytes of a device than a limit of this name."""
    if needed > limit:
        raise ValueError(
            f"{what} {gigabytes(needed)} on each device, over {name} {gigabytes(limit)}; use more devices "
            "(--model-devices, --data-devices), a smaller --batch, --no-continuous, or another --dtype or "
            "--cache-dtype"
        )


def plan_values(config: RunConfig, plan: Plan) -> dict:
    """The plan as JSON values."""
    return {"config": config.identity(), "methods": list(config.configurations()), "plan": asdict(plan)}


def plan_text(config: RunConfig, plan: Plan, configs: Mapping[str, DecodeConfig]) -> str:
    """The plan in words and a table."""
    kind = "made or read" if plan.exact else "as published; the data is not at hand"
    devices = config.data_devices * config.model_devices
    together = f"in {plan.batches} batch{'es' * (plan.batches > 1)} of {config.batch}"
    if config.refills(plan.forced):
        together = f"{config.batch} together, the next as soon as one ends"
    replies = f"replies of up to {plan.new_tokens}"
    if plan.forced:
        replies = f"replies of about {plan.new_tokens}, which are given and decoded along"
    weights = "size not known" if plan.weights is None else f"{gigabytes(plan.weights)} on each device"
    lines = [
        f"model     {config.model}, {devices} device{'s' * (devices > 1)} "
        f"({config.data_devices} for the batch x {config.model_devices} for heads)",
        f"task      {describe(config.task)}",
        f"examples  {plan.examples} ({kind}), {config.samples} "
        f"repl{'y' if config.samples == 1 else 'ies'} each, {together}",
        f"length    prompts of up to about {plan.prompt_tokens} tokens, {replies}",
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
