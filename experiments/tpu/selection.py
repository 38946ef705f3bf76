"""What page selection costs on a TPU, read off the compiler's final schedule as in `tpu_schedule.py`.

The kernel is one loop over blocks of pages, which scores them, and behind its last turn the choice: loops
that order the scores, search for the threshold (a loop over passes around one over chunks of scores), count,
mark and look up. Shares of attention come before them, a loop over the heads of a group around three over
chunks. Their bundles are read off the schedule, how often they turn off the shapes.
"""

import functools
from dataclasses import dataclass

from pallas_kernels.tpu import CHIPS, LANES
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu.schedule import Bundle, dump

_PAGES, _SELECTED = 8192, 1280  # of the compiled kernel: at fewer, loops that turn once are no loops
PASSES = 11
"""Of the search, at most: a digit of base 8 of a 32-bit key each. It ends earlier where a digit decides."""


@dataclass
class Loop:
    """A loop of a schedule.

    Attributes:
      own: its bundles without those of inner loops.
      inner: the loops inside, in order.
    """

    own: int
    inner: list["Loop"]


@dataclass(frozen=True)
class SelectionSchedule:
    """What a selection issues.

    Attributes:
      block: bundles for each block of pages: their scores.
      chunk: bundles of the choice for each chunk of 1024 pages, shares included, the search aside.
      search_chunk: bundles for each chunk and pass.
      search_pass: bundles for each pass beside.
      places: bundles for each 128 places of the result.
      once: bundles beside.
    """

    block: int
    chunk: int
    search_chunk: int
    search_pass: int
    places: int
    once: int

    def choice(self, pages: int, selected: int) -> int:
        """Bundles of the choice of `selected` among `pages`, with the longest search."""
        chunks = -(-pages // (8 * LANES))
        search = PASSES * (self.search_pass + chunks * self.search_chunk)
        return self.once + chunks * self.chunk + search + -(-selected // LANES) * self.places


def loops(bundles: list[Bundle]) -> Loop:
    """The loops of a schedule, as the inner ones of one around all."""
    root = Loop(0, [])
    path = [root]  # the last loop of each depth
    for bundle in bundles:
        if bundle.label == "LB":
            path = path[: bundle.depth]
            loop = Loop(0, [])
            path[-1].inner.append(loop)
            path.append(loop)
        path[min(bundle.depth, len(path) - 1)].own += 1
    return root


def measure(bundles: list[Bundle], group: int) -> SelectionSchedule:
    """The schedule of a selection for `group` query heads of a KV head.

    Raises:
      RuntimeError: its loops are not those that the kernel is known to have.
    """
    root = loops(bundles)
    nested = [len(loop.inner) for loop in root.inner[0].inner] if len(root.inner) == 1 else []
    if nested not in ([0, 1, 0, 0, 0], [3, 0, 1, 0, 0, 0]):
        raise RuntimeError(f"the schedule of page selection has other loops than expected: {root}")
    grid = root.inner[0]
    *shares, order, search, counting, marking, places = grid.inner
    start = next(i for i, bundle in enumerate(bundles) if bundle.depth == 2)
    block = sum(bundle.depth == 1 for bundle in bundles[:start])
    return SelectionSchedule(
        block=block,
        chunk=order.own
        + counting.own
        + marking.own
        + group * sum(loop.own for head in shares for loop in head.inner),
        search_chunk=search.inner[0].own,
        search_pass=search.own,
        places=places.own,
        once=root.own + grid.own - block + group * sum(head.own for head in shares),
    )


def compile_selection(
    chip: str, block: int, heads: int, group: int, dim: int, score: str, kind: str, group_reduce: str
) -> None:
    """Compiles the selection of one sequence for a chip, in bfloat16, `block` pages at a time.

    Args:
      chip: name in `CHIPS`.
      block: pages of each head that a turn of the grid scores.
      heads: KV heads.
      group: query heads of each.
      dim: of a head.
      score: as `select_pages` has it.
      kind: of statistics.
      group_reduce: as `select_pages` has it.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import STATISTICS
    from pallas_kernels.selection.tpu.kernels import select_pages

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    select = functools.partial(
        select_pages,
        page_size=16,
        capacity=_SELECTED,
        score=score,
        group_reduce=group_reduce,
        sink_pages=1,
        block=block,
    )
    position = shape(1, dtype=jnp.int32)
    statistics = jax.eval_shape(lambda: STATISTICS[kind].zeros((1, heads, _PAGES), dim, "bfloat16"))
    tpu_compiler.compile_for(chip, select, shape(1, heads * group, dim), statistics, position, position)


def selection(chip: str, *, group: int, **arguments: int | str) -> SelectionSchedule:
    """The schedule of page selection; arguments as those of `compile_selection`."""
    arguments |= {"chip": chip, "group": group}
    target = "retro_jax.experiments.tpu.selection:compile_selection"
    return measure(dump(target, "select_pages", **arguments), group)


def predict(chip: str, schedule: SelectionSchedule, pages: int, selected: int, block: int, bytes_read: int):
    """Seconds that one core takes to issue and to read: the scores, and then the choice.

    Args:
      chip: name in `CHIPS`.
      schedule: of the kernel.
      pages: of the context.
      selected: how many are chosen.
      block: pages that a turn of the grid scores.
      bytes_read: statistics of all heads of this core.

    Returns:
      Seconds of scores' bundles, of reading, and of the choice's bundles, which wait for both.
    """
    clock, bandwidth = CHIPS[chip].clock, CHIPS[chip].bandwidth
    return (
        -(-pages // block) * schedule.block / clock,
        bytes_read / bandwidth,
        schedule.choice(pages, selected) / clock,
    )
