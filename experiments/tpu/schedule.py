"""What a kernel costs on a TPU, read off the compiler's final schedule on a machine without one.

A TensorCore issues one bundle of instructions a cycle, in an order that the compiler fixes. So the bundles
of the loop over blocks of pages, over the pages of a block, are the cycles that a page takes when no copy is
waited for.

Method: the compiler runs in a process of its own and dumps its last schedule, where each bundle shows its
loop depth. The loop over blocks is the deepest one with matrix products. Its bundles count but for those
behind a forward branch, up to where it lands: what is there happens about once an item, not once a block.
The loop around it is counted alike, and what blocks do once an item is added. Of pages in 8 bits, two more
loops turn for each 128 pages of the context: one has their scales copied, and one transposes them.

`python -m retro_jax.experiments.tpu.schedule` prints the table for the attention kernel, `... costs` what
tests hold it to.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from pallas_kernels.tpu import CHIPS, LANES, PAGE_SIZES, PAGE_SIZES_IN_8_BITS
from retro_jax.experiments.tpu import compiler as tpu_compiler

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(LB|PF|[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
SCALED_TOGETHER = LANES
"""Pages whose scales are copied, and transposed, together."""
_DELAY = 4
"""Bundles after a branch that are issued whether it is taken or not."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One bundle of a schedule.

    Attributes:
      label: "LB" at the beginning of a loop's body, "PF" where a forward branch lands, or "".
      depth: of the loop nest.
      text: its instructions.
    """

    label: str
    depth: int
    text: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a kernel issues.

    Attributes:
      block: bundles for each block of pages.
      item: bundles for each item beside its blocks.
      pages: pages of a block.
      spills: registers of the block's loop that are written to memory.
      scales: bundles for each `SCALED_TOGETHER` pages of the context, whose scales come; 0 if none do.
    """

    block: int
    item: int
    pages: int
    spills: int
    scales: int = 0

    @property
    def page(self) -> float:
        """Bundles for each page of a full block."""
        return self.block / self.pages


def dump(target: str, kernel: str, **arguments) -> list[Bundle]:
    """Compiles something in a process of its own; the final schedule of one of its kernels.

    Args:
      target: "module:function"; the function compiles it.
      kernel: the kernel's name.
      **arguments: of the function, as JSON has them.

    Raises:
      RuntimeError: the process failed, or there is no such kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "retro_jax.experiments.tpu.schedule", target, json.dumps(arguments)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = sorted(Path(folder).glob(f"*-{kernel}.*[0-9]-final_bundles.txt"))
        if done.returncode or not found:
            raise RuntimeError(f"no schedule of {kernel} by {target}({arguments}): {done.stderr[-2000:]}")
        return parse(found[-1].read_text())


def parse(text: str) -> list[Bundle]:
    """The bundles of a dumped schedule."""
    lines = (_BUNDLE.match(line) for line in text.splitlines())
    return [Bundle(line[1] or "", len(line[2]), line[3]) for line in lines if line]


def loop_over_blocks(bundles: list[Bundle]) -> tuple[int, int]:
    """First and last bundle of the deepest loop with matrix products."""
    depth = max(bundle.depth for bundle in bundles if "vmatmul" in bundle.text)
    inside = next(i for i, b in enumerate(bundles) if b.depth == depth and "vmatmul" in b.text)
    return loop_around(bundles, inside, depth)


def loop_around(bundles: list[Bundle], inside: int, depth: int) -> tuple[int, int]:
    """First and last bundle of the loop of this depth around a bundle."""
    first = last = inside
    while bundles[first].label != "LB" or bundles[first].depth != depth:
        first -= 1
    while (
        last + 1 < len(bundles)
        and bundles[last + 1].depth >= depth
        and not (bundles[last + 1].label == "LB" and bundles[last + 1].depth == depth)
    ):
        last += 1
    return first, last


def skipped(bundles: list[Bundle], loop: tuple[int, int]) -> set[int]:
    """Bundles behind a forward branch that is not around the loop over blocks."""
    landings = {
        region: i
        for i, b in enumerate(bundles)
        for region in re.findall(r"Start/End empty region (\d+)", b.text)
    }
    result = set()
    for i, bundle in enumerate(bundles):
        target = re.search(r"sbr\.rel .*target = \$region(\d+)", bundle.text)
        landing = landings.get(target[1], 0) if target else 0
        around = i < loop[0] and landing > loop[1]
        if landing > i and not around:
            result |= set(range(i + 1 + _DELAY, landing))
    return result


def measure(bundles: list[Bundle], pages: int) -> Schedule:
    """The schedule of a kernel whose blocks hold so many pages."""
    loop = loop_over_blocks(bundles)
    depth = bundles[loop[0]].depth
    seldom = skipped(bundles, loop)
    block = [i for i in range(loop[0], loop[1] + 1) if bundles[i].depth == depth]
    often = [i for i in block if i not in seldom]
    outer = loop_around(bundles, loop[0] - 1, depth - 1)
    item = [i for i in range(outer[0], outer[1] + 1) if bundles[i].depth == depth - 1 and i not in seldom]
    spills = sum(bool(re.search(r"st \[[^]]*_spill", bundles[i].text)) for i in often)
    return Schedule(
        len(often), len(item) + len(block) - len(often), pages, spills, _scales(bundles, outer, depth)
    )


def _scales(bundles: list[Bundle], outer: tuple[int, int], depth: int) -> int:
    """Bundles of the loop in `outer` that transposes scales, and of the next one, which has others copied."""
    starts = [
        i for i in range(outer[0], outer[1] + 1) if bundles[i].label == "LB" and bundles[i].depth == depth
    ]
    loops = [bundles[first : last + 1] for first, last in (loop_around(bundles, i, depth) for i in starts)]
    for transposing, copying in itertools.pairwise(loops):
        if any("vxpose" in bundle.text for bundle in transposing):
            return len(transposing) + len(copying)
    return 0


def compile_attention(
    chip,
    page_size,
    window,
    context,
    head_dim=128,
    kv_heads=8,
    group=4,
    pages=None,
    ahead=None,
    cache_dtype="bfloat16",
):
    """Retrospective attention of one sequence compiled for a chip, in bfloat16 but for the cache's dtype."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention.tpu.blocks import Blocks
    from pallas_kernels.attention.tpu.kernels import retro_attention
    from pallas_kernels.pages import empty_pages

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    P, K, W, N, D = context // page_size, kv_heads, window, kv_heads * group, head_dim
    blocks = None if pages is None else Blocks(pages, ahead)
    return tpu_compiler.compile_for(
        chip,
        lambda *arguments: retro_attention(*arguments, blocks=blocks),
        shape(1, W, N, D),
        jax.eval_shape(functools.partial(empty_pages, (1, K, P, 2, page_size, D), cache_dtype)),
        shape(1, K, P // 4, dtype=jnp.int32),
        shape(1, K, dtype=jnp.int32),
        shape(1, K, P, dtype=jnp.int32),
        shape(1, W, dtype=jnp.int32),
        shape(1, W - 1, N, D, dtype=jnp.float32),
        shape(1, W - 1, N, dtype=jnp.float32),
        donate=4,
    )


@functools.cache
def attention(chip: str, page_size: int, window: int, context: int = 32768, **arguments) -> Schedule:
    """The schedule of retrospective attention; arguments as those of `compile_attention`."""
    from pallas_kernels.attention.tpu.blocks import choose_blocks

    arguments = {"chip": chip, "page_size": page_size, "window": window, "context": context, **arguments}
    bundles = dump("retro_jax.experiments.tpu.schedule:compile_attention", "retro_attention", **arguments)
    capacity = context // page_size // 4
    blocks = choose_blocks(CHIPS[chip], page_size, arguments.get("head_dim", 128), 2, capacity)
    return measure(bundles, arguments.get("pages") or blocks.pages)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one call: issuing, reading from HBM, and what comes before the first block arrives."""

    issue: float
    memory: float
    start: float

    @property
    def time(self) -> float:
        """Copies are under way while bundles are issued, so the longer of both, and the start."""
        return max(self.issue, self.memory) + self.start


def predict(
    chip: str,
    schedule: Schedule,
    pages: int,
    page_bytes: int,
    items: int,
    *,
    context_pages: int = 0,
    scale_bytes: int = 0,
) -> Prediction:
    """The time of attention to pages of each of some items on one core of a chip.

    Args:
      chip: name in `CHIPS`.
      schedule: of the kernel.
      pages: that are loaded.
      page_bytes: of keys and values of a page, or of their codes.
      items: sequences and KV heads.
      context_pages: whose scales come, of pages in 8 bits.
      scale_bytes: of the scales of a page.
    """
    from pallas_kernels.attention.tpu.blocks import LATENCY

    blocks, chunks = -(-pages // schedule.pages), -(-context_pages // SCALED_TOGETHER)
    issue = items * (blocks * schedule.block + schedule.item + chunks * schedule.scales) / CHIPS[chip].clock
    read = items * (pages * page_bytes + chunks * SCALED_TOGETHER * scale_bytes)
    return Prediction(issue, read / CHIPS[chip].bandwidth, LATENCY)


def costs(chip: str) -> dict:
    """What attention of a window of 4 costs at a chip's own page size: bundles, and bytes of memory."""
    from pallas_kernels.attention.tpu.blocks import choose_blocks, vmem_bytes

    page_size, window, context, group, head_dim = CHIPS[chip].page_size, 4, 32768, 4, 128
    schedule = attention(chip, page_size, window)
    blocks = choose_blocks(CHIPS[chip], page_size, head_dim, 2, context // page_size // 4)
    memory = compile_attention(chip, page_size, window, context).memory_analysis()
    return {
        "page_size": page_size,
        "bundles_per_page": schedule.page,
        "bundles_per_item": schedule.item,
        "spills": schedule.spills,
        "vmem_bytes": vmem_bytes(blocks, page_size, head_dim, 2, window * group, cached=True),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def costs_in_8_bits(chip: str) -> dict:
    """The bundles of attention over int8 pages of twice a chip's own size, or of 64 tokens."""
    page_size = min(2 * CHIPS[chip].page_size, max(PAGE_SIZES_IN_8_BITS))
    schedule = attention(chip, page_size, 4, cache_dtype="int8")
    return {
        "page_size": page_size,
        "bundles_per_page": schedule.page,
        "bundles_per_item": schedule.item,
        "bundles_per_128_pages_of_context": schedule.scales,
        "spills": schedule.spills,
    }


def main() -> None:
    """Prints the table, or compiles what the parent process asks for."""
    if len(sys.argv) == 3:
        tpu_compiler.without_a_tpu()
        module, function = sys.argv[1].split(":")
        getattr(import_module(module), function)(**json.loads(sys.argv[2]))
        return
    if sys.argv[1:] == ["costs"]:
        tpu_compiler.without_a_tpu()
        found = {"bfloat16": costs, "int8": costs_in_8_bits}
        print(
            json.dumps({dtype: {chip: of(chip) for chip in CHIPS} for dtype, of in found.items()}, indent=2)
        )
        return
    print("| chip | page | window | bundles a page | a block | an item | spills | HBM delivers a page in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for chip in CHIPS.values():
        for page_size in PAGE_SIZES:
            for window in (1, 2, 4, 8):
                it = attention(chip.name, page_size, window)
                memory = page_size * 512 / chip.bytes_per_bundle
                print(
                    f"| {chip.name} | {page_size} | {window} | {it.page:.1f} | {it.block} | {it.item} "
                    f"| {it.spills} | {memory:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
