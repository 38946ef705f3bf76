"""Public functions of page selection."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import by_sequence, dispatch
from pallas_kernels.scores import GROUP_REDUCE, SCORES
from pallas_kernels.selection import reference
from pallas_kernels.selection.gpu import kernels as mosaic_gpu
from pallas_kernels.selection.tpu import kernels as mosaic_tpu
from pallas_kernels.statistics import Statistics, statistic_of


def select_pages(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    score: str = "bounds",
    group_reduce: str = "mean",
    sink_pages: int = 1,
    implementation: str | None = None,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The set of pages that the newest query loads, one per KV head.

    The page of the newest position and the first `sink_pages` pages are always among them, then the best
    scores, ties to the lower page; never a page beyond the newest position.

    Args:
      q: the newest query of every head, rotary embedding applied.
      statistics: page statistics of one layer, of the kind that `score` reads; those of pages beyond
        the newest position may hold anything.
      positions: the newest position.
      budgets: pages that may be loaded; at least the forced ones, or 0 to load nothing.
      page_size: S, tokens per page.
      capacity: C, the static size of the result; budgets above it are not served.
      score: name in `SCORES`.
      group_reduce: how the scores of a group's query heads become one: name in `GROUP_REDUCE`.
      sink_pages: pages at the beginning of the sequence that are always selected.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      page_ids: the selected pages in the first `counts` places, in no particular order.
      counts: min(budget, pages up to the newest position).

    Raises:
      ValueError: unknown score or group_reduce, statistics that the score does not read, query heads that are
        no multiple of KV heads, or a capacity that does not lie in 1..P.
    """
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown; use one of {', '.join(SCORES)}")
    if group_reduce not in GROUP_REDUCE:
        raise ValueError(f"group_reduce {group_reduce!r} is unknown; use one of {', '.join(GROUP_REDUCE)}")
    kind = statistic_of(statistics).name
    kv_heads, pages = statistics.values.shape[1:3]
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_heads} KV heads")
    readable = SCORES[score].statistics
    if kind not in readable:
        raise ValueError(
            f"{kind!r} statistics were given; score {score!r} reads {' or '.join(readable)} statistics"
        )
    if not 1 <= capacity <= pages:
        raise ValueError(f"capacity {capacity} is not within 1..{pages}, the pages of the cache")
    return dispatch(
        "select_pages",
        implementation,
        {
            "xla": reference.select_pages,
            "mosaic_gpu": mosaic_gpu.select_pages,
            "mosaic_tpu": mosaic_tpu.select_pages,
        },
        (by_sequence(1, 1, None, None), by_sequence(1, 1)),
        q,
        statistics,
        positions,
        budgets,
        page_size=page_size,
        capacity=capacity,
        score=score,
        group_reduce=group_reduce,
        sink_pages=sink_pages,
    )


def choose_pages(
    scores: Float[Array, "B K P"],
    positions: Int[Array, " B"],
    budgets: Int[Array, " B"],
    *,
    page_size: int,
    capacity: int,
    sink_pages: int,
    implementation: str | None = None,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The budget's best pages of any scores, forced pages among them, as `select_pages` returns them.

    A page that scores -inf is never chosen, unless it is forced. No kernel has been written for it.
    """
    return dispatch(
        "choose_pages",
        implementation,
        {"xla": reference.choose_pages},
        (by_sequence(1, None, None), by_sequence(1, 1)),
        scores,
        positions,
        budgets,
        page_size=page_size,
        capacity=capacity,
        sink_pages=sink_pages,
    )


def page_scores(
    q: Float[Array, "B N D"],
    statistics: Statistics,
    positions: Int[Array, " B"],
    *,
    page_size: int,
    score: str,
    group_reduce: str,
    implementation: str | None = None,
) -> Float[Array, "B K P"]:
    """The score of every page for the newest query, from its statistics; see `select_pages`."""
    return dispatch(
        "page_scores",
        implementation,
        {"xla": reference.page_scores},
        (by_sequence(1, 1, None), *by_sequence(1)),
        q,
        statistics,
        positions,
        page_size=page_size,
        score=score,
        group_reduce=group_reduce,
    )
