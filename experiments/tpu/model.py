"""The time of a decode step on a TPU, predicted from bytes and from the compiler's schedules, without a TPU.

Per part of a step: the bytes that one device must read, the bundles that one of its TensorCores must issue,
and the longer of the times that these take. Not in it: sums over devices, launches of kernels, stalls within
a schedule, and what XLA does not hide of its own small operations.
"""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import pages_for
from pallas_kernels.attention.tpu.blocks import LATENCY, choose_blocks
from pallas_kernels.selection.tpu.kernels import heads_per_step, pages_per_block
from pallas_kernels.statistics import STATISTICS
from pallas_kernels.tpu import CHIPS, Chip
from retro_jax import DecodeConfig, models
from retro_jax.budget import Budget, budget_pages
from retro_jax.drafts import weight_bytes
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu import schedule as tpu_schedule
from retro_jax.experiments.tpu import selection as tpu_selection
from retro_jax.models.config import ModelConfig
from retro_jax.plan import layer_plan

_SCHEDULED_CONTEXT = 32768  # of the compiled kernels: what a block issues does not depend on it


@dataclass(frozen=True)
class Part:
    """One part of a decode step, in one layer or, for the weights, in all.

    Attributes:
      name: "weights", "dense attention", "window attention", "selection", "attention" or "update".
      layers: how many layers have it.
      bytes: that one device reads in each.
      bundles: that one of its TensorCores issues in each; 0 where that is not counted.
      memory: seconds that the bytes take at the bandwidth of HBM.
      time: predicted seconds.
      binds: "memory", "issue" or "latency", whichever the time is made of most.
    """

    name: str
    layers: int
    bytes: int
    bundles: int
    memory: float
    time: float
    binds: str


@functools.cache
def _schedule(chip: str, page_size: int, head_dim: int, group: int, window: int, dense: bool):
    if not dense:
        return tpu_schedule.attention(
            chip, page_size, window, _SCHEDULED_CONTEXT, head_dim=head_dim, group=group
        )
    arguments = {"chip": chip, "page_size": page_size, "head_dim": head_dim, "group": group}
    bundles = tpu_schedule.dump(f"{__name__}:compile_dense", "dense_attention", **arguments)
    blocks = choose_blocks(CHIPS[chip], page_size, head_dim, 2, _SCHEDULED_CONTEXT // page_size)
    return tpu_schedule.measure(bundles, blocks.pages)


def compile_dense(chip: str, page_size: int, head_dim: int, group: int, kv_heads: int = 8) -> None:
    """Compiles dense attention of one sequence for a chip, in bfloat16."""
    from pallas_kernels.attention.tpu.kernels import dense_attention

    P = _SCHEDULED_CONTEXT // page_size
    tpu_compiler.compile_for(
        chip,
        dense_attention,
        jax.ShapeDtypeStruct((1, 1, kv_heads * group, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, kv_heads, P, 2, page_size, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
    )


_selection = functools.cache(tpu_selection.selection)


def weights(model: ModelConfig, chip: Chip, devices: int, tokens: int) -> Part:
    """All weights but the embedding, of which a step reads a row, and experts that no token chooses."""
    params = jax.eval_shape(lambda: models.random_params(model, jax.random.key(0)))
    size = int(weight_bytes(params, model, tokens))
    seconds = size / devices / (chip.bandwidth * chip.cores)
    return Part("weights", 1, size // devices, 0, seconds, seconds, "memory")


def attention(model, chip, page_size, pages, window, items, layers, dense) -> Part:
    """Attention to `pages` pages per sequence and KV head; `items` of these on a core."""
    group = model.num_heads // model.num_kv_heads
    schedule = _schedule(chip.name, page_size, model.head_dim, group, window, dense)
    page_bytes = 2 * page_size * model.head_dim * 2
    it = tpu_schedule.predict(chip.name, schedule, pages, page_bytes, items)
    return Part(
        "dense attention" if dense else "attention",
        layers,
        bytes=items * chip.cores * pages * page_bytes,
        bundles=round(it.issue * chip.clock),
        memory=it.memory,
        time=it.time,
        binds="issue" if it.issue > it.memory else "memory",
    )


def selection(model, config, chip, context, selected, batch, heads, layers) -> Part:
    """Selection among all pages: scores while statistics arrive, then the choice."""
    pages, dim = context // config.page_size, model.head_dim
    kind = STATISTICS[config.kept_statistics]
    statistics = jax.eval_shape(lambda: kind.zeros((batch, heads, pages), dim, "bfloat16")).values
    together = heads_per_step(batch, heads, chip.cores)
    turns = math.ceil(batch * heads / together / chip.cores)  # of the grid around blocks, on a core
    group = model.num_heads // model.num_kv_heads
    block = pages_per_block(chip.bandwidth, together, statistics)
    by = {"score": config.score, "kind": kind.name, "group_reduce": config.group_reduce}
    schedule = _selection(chip.name, block=block, heads=heads, group=group, dim=dim, **by)
    size = turns * together * pages * kind.vectors * kind.vector_bytes(dim, 2)
    scores, memory, choice = tpu_selection.predict(chip.name, schedule, pages, selected, block, size)
    issue = turns * (scores + choice)
    streaming = max(turns * scores, memory)
    return Part(
        "selection",
        layers,
        bytes=size * chip.cores,
        bundles=round(issue * chip.clock),
        memory=memory,
        time=streaming + turns * choice + LATENCY,
        binds="issue" if issue > memory else "memory",
    )


def decode_step(
    model: ModelConfig, config: DecodeConfig, chip: Chip, context: int, devices: int, batch: int
) -> list[Part]:
    """The parts of a decode step that reads a context of so many tokens, in bfloat16.

    Layers with a sliding window are taken to read all of their ring by the kernel of dense attention, which
    serves those with one query.

    Args:
      model: sizes.
      config: method, window, budget and page size.
      chip: of the devices.
      context: tokens in the cache; a multiple of the page size.
      devices: over which KV heads are spread.
      batch: sequences.

    Raises:
      ValueError: heads do not divide over devices, or pages not over the context.
    """
    if model.num_kv_heads % devices:
        raise ValueError(
            f"{model.num_kv_heads} KV heads of {model.name} do not divide over {devices} devices"
        )
    if context % config.page_size:
        raise ValueError(f"a context of {context} tokens is not a multiple of pages of {config.page_size}")
    heads, pages = model.num_kv_heads // devices, context // config.page_size
    items = batch * heads // chip.cores if batch * heads % chip.cores == 0 else batch * heads
    plan = layer_plan(model, config)
    dense, sparse = plan.num_dense, plan.num_sparse
    update = Part("update", model.num_layers, 0, 0, 0.0, 2 * LATENCY, "latency")  # in, and back
    parts = [weights(model, chip, devices, batch * max(plan.windows)), update]
    if dense:
        parts.append(attention(model, chip, config.page_size, pages, 1, items, dense, dense=True))
    for ring, layers in Counter(ring for ring in plan.rings if ring is not None).items():
        held = min(pages, pages_for(ring, config.page_size))
        part = attention(model, chip, config.page_size, held, 1, items, layers, dense=True)
        parts.append(replace(part, name="window attention"))
    if sparse:
        itemsize = jnp.dtype(model.dtype).itemsize
        loads = budget_pages(config, Budget.of(config, 1), jnp.array([context]), model.head_dim, itemsize)
        selected = int(loads[0])
        windows = itertools.compress(plan.windows, plan.sparse)
        parts += [
            selection(model, config, chip, context, selected, batch, heads, sparse),
            *(
                attention(model, chip, config.page_size, selected, window, items, layers, dense=False)
                for window, layers in sorted(Counter(windows).items(), reverse=True)
            ),
        ]
    return parts
