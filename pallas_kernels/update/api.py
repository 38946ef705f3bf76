"""Public functions of the page update."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import by_sequence, dispatch, kernels_of_device
from pallas_kernels.pages import Pages, check_pages
from pallas_kernels.statistics import Statistics, statistic_of
from pallas_kernels.update import reference
from pallas_kernels.update.gpu import kernels as mosaic_gpu
from pallas_kernels.update.tpu import kernels as mosaic_tpu


def update_pages(
    pages: Pages,
    statistics: Statistics | None,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    implementation: str | None = None,
) -> tuple[Pages, Statistics | None]:
    """Write keys and values of T consecutive positions, over what was there.

    The statistics of every touched page are computed anew from the page, over its tokens up to the last one
    written: a key that is overwritten can shrink them.

    Pages in 8 bits get codes and scales (`pallas_kernels.pages.quantize`) of the tokens that are written, and
    no others change; statistics are those of the keys as they are read back.

    Args:
      pages: keys and values of one layer; donate it to update in place.
      statistics: page statistics of that layer, or None in a layer that has none.
      k: keys, rotary embedding applied.
      v: values.
      start: position of the first of the T tokens; may be negative where the first ones are not written.
      write: which of them to write. A sequence without any is left as it is. The last one written must
        be the last token of the sequence.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The new pages and statistics.

    Raises:
      TypeError: `statistics` are no `Statistics`, or `pages` of no dtype of pages.
      ValueError: they are of an unknown kind, or have arrays of another kind; or scales of pages do not fit.
    """
    check_pages(pages)
    kernels = implementation or kernels_of_device()
    if statistics is not None and not statistic_of(statistics).fused_by(kernels):
        pages, _ = update_pages(pages, None, k, v, start, write, implementation=implementation)
        return pages, refresh_statistics(statistics, pages, start, write, implementation=implementation)
    return dispatch(
        "update_pages",
        implementation,
        {
            "xla": reference.update_pages,
            "mosaic_gpu": mosaic_gpu.update_pages,
            "mosaic_tpu": mosaic_tpu.update_pages,
        },
        (by_sequence(1, 1, 2, 2, None, None), by_sequence(1, 1)),
        pages,
        statistics,
        k,
        v,
        start,
        write,
    )


def refresh_statistics(
    statistics: Statistics,
    pages: Pages,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    *,
    summarize: reference.Summarize | None = None,
    implementation: str | None = None,
) -> Statistics:
    """The statistics of every page that a write touched, computed anew from the page.

    Over its tokens up to the last one written, which must be the last token of the sequence.

    Args:
      statistics: page statistics of one layer.
      pages: its keys and values, those that were written included.
      start: position of the first of the T tokens; may be negative where the first ones are not written.
      write: which of them were written. A sequence without any is left as it is.
      summarize: makes the vectors of whole pages, see `reference.Summarize`; None: the statistic itself.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      TypeError: as for `update_pages`.
      ValueError: as for `update_pages`.
    """
    check_pages(pages)
    return dispatch(
        f"refresh_statistics of {statistic_of(statistics).name!r}",
        implementation,
        {"xla": reference.refresh_statistics},
        None if summarize else (by_sequence(1, 1, None, None), *by_sequence(1)),  # it may hold heads' weights
        statistics,
        pages,
        start,
        write,
        summarize=summarize,
    )
