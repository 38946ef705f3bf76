"""Which operations of a decode step run through kernels: pairs of configuration and chip, without a chip.

    python -m retro_jax.experiments.bench.kernel_pairs --out docs/kernels.md

Each operation that a configuration asks for is asked for on each chip, as a decode step would ask there: a
kernel takes it, or refuses it with the reason that the log shows.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from pallas_kernels import CODES, GROUP_REDUCE
from retro_jax import DecodeConfig
from retro_jax.experiments.bench.chips import CHIPS, PAGE_SIZES, PAGES, Case, refusals
from retro_jax.experiments.io.tables import markdown
from retro_jax.selectors import LEARNED, SELECTORS


def scored_by() -> Iterator[dict[str, Any]]:
    """Every way to select and to estimate pages that a configuration allows."""
    kinds = [
        (score, kind)
        for score in SELECTORS
        for kind in SELECTORS[score].statistics or (None, "mean_key_int8")
    ]
    for (score, kind), reduce, residual in itertools.product(kinds, GROUP_REDUCE, (0, 8)):
        fields = {"score": score, "statistics": kind, "group_reduce": reduce, "residual_pages": residual}
        if score == LEARNED:
            fields["score_channels"] = 64  # other numbers have a table of their own
        try:
            config = DecodeConfig(**fields)
        except ValueError:
            continue
        if kind in (None, config.kept_statistics):
            yield fields


def tables() -> dict[str, list[tuple[dict[str, str], Case]]]:
    """The cases of each table by their place in it: names of rows, and the case."""
    selections = [
        (
            {
                "score": fields["score"],
                "statistics": DecodeConfig(**fields).kept_statistics or "none",
                "group_reduce": fields["group_reduce"],
                "residual_pages": "more" if fields["residual_pages"] else "0",
                "page_size": str(page_size),
            },
            Case(DecodeConfig(page_size=page_size, dense_layers=1, **fields)),
        )
        for fields in scored_by()
        for page_size in PAGE_SIZES
    ]
    learned = [
        (
            {"score_channels": str(channels), "page_size": str(page_size)},
            Case(
                DecodeConfig(
                    page_size=page_size,
                    dense_layers=1,
                    score=LEARNED,
                    score_channels=channels,
                    group_reduce="mass",
                )
            ),
        )
        for channels, page_size in itertools.product((16, 32, 48, 64, 128), PAGE_SIZES)
    ]
    config = DecodeConfig(dense_layers=1)
    windows = [
        (
            {"window": str(window), "group": str(group)},
            Case(dataclasses.replace(config, window=window), group=group),
        )
        for window, group in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 4, 8, 71))
    ]
    heads = [
        ({"dtype": dtype, "head_dim": str(dim)}, Case(config, head_dim=dim, dtype=dtype))
        for dtype, dim in itertools.product(("bfloat16", "float32"), (64, 80, 96, 128, 256))
    ]
    caches = [
        ({"pages": str(pages), "batch": str(batch)}, Case(config, pages=pages, batch=batch))
        for pages, batch in itertools.product((8, 40, 64, 8192, 65536), (1, 64))
    ]
    eight_bits = [
        (
            {"cache_dtype": dtype, "statistics": kind, "head_dim": str(dim), "page_size": str(size)},
            Case(
                dataclasses.replace(config, cache_dtype=dtype, score=score, statistics=kind, page_size=size),
                head_dim=dim,
            ),
        )
        for dtype, (score, kind), dim, size in itertools.product(
            CODES,
            (("bounds", "min_max"), ("mean_key", "mean_key"), ("mean_key", "mean_key_int8")),
            (64, 128, 256),
            (16, 32, 64, 128),
        )
    ]
    sliding = [
        (
            {"sliding window": str(tokens), "window": str(w), "rectify_every": str(every), "sinks": sinks},
            Case(
                dataclasses.replace(config, window=w, rectify_every=every),
                window=tokens,
                sinks=sinks == "yes",
            ),
        )
        for tokens, w, every, sinks in itertools.product(
            (100, 128, 1024, 4096), (1, 2, 4), (None, 8), ("no", "yes")
        )
    ]
    return {
        "Scores, statistics, reductions, residuals and page sizes": selections,
        "Channels of learned scores": learned,
        "Windows and groups of query heads": windows,
        "Dtypes and head_dim": heads,
        "Pages of the cache and sequences": caches,
        "Keys and values in 8 bits": eight_bits,
        "Layers with a sliding window, and with sinks": sliding,
    }


@contextlib.contextmanager
def _whole_tracebacks() -> Iterator[None]:
    """Within it JAX does not shorten the traceback of each refusal, which takes longer than to refuse."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


@_whole_tracebacks()
def page() -> str:
    """The page of all tables, and of the reasons in them."""
    parts, reasons = [_HEAD], {}
    for title, cases in tables().items():
        rows = []
        for names, case in cases:
            found = {chip: refusals(case, chip) for chip in CHIPS}
            for chip, by_operation in found.items():
                for reason in by_operation.values():
                    reasons.setdefault(reason, []).append(chip)
            rows.append((dict(names), tuple(_cell(by_operation) for by_operation in found.values())))
        parts.append(f"## {title}\n\n" + _table(rows))
    lines = [f"- {reason} ({', '.join(dict.fromkeys(chips))})" for reason, chips in sorted(reasons.items())]
    parts.append("## Reasons\n\nAs in the log, where each is told once:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


_HEAD = f"""# Which kernels a decode step runs through

Written by `python -m retro_jax.experiments.bench.kernel_pairs --out docs/kernels.md`, which asks for every
operation of every row on every chip, without one. A cell names what runs through XLA there, and why is told
once in the log; "-" is nothing: all of it runs through kernels. Other devices, and prefill, run through XLA
always. Where a table does not say otherwise: RetroAttention with w = 4, {PAGES} pages of 16 tokens in
bfloat16, head_dim 128, 4 query heads a KV head, one sequence. "all" is update, dense attention, selection and
attention; "additions" are those to the residual stream with its norms, which on TPUs are XLA's."""
_ALL = ("update", "dense attention", "selection", "attention")


def _cell(by_operation: Mapping[str, str]) -> str:
    names = list(by_operation)
    if set(_ALL) <= set(names):
        names = ["all", *(name for name in names if name not in _ALL)]
    return ", ".join(names) or "-"


def _table(rows: Sequence[tuple[dict[str, str], tuple[str, ...]]]) -> str:
    """Rows with equal cells are one row, chips with equal cells one column."""
    for axis in reversed(list(rows[0][0])):
        merged: dict[tuple, tuple[dict[str, str], tuple[str, ...]]] = {}
        for names, cells in rows:
            rest = (*((name, value) for name, value in names.items() if name != axis), cells)
            if rest in merged:
                merged[rest][0][axis] += f", {names[axis]}"
            else:
                merged[rest] = dict(names), cells
        rows = list(merged.values())
    columns: dict[tuple[str, ...], list[str]] = {}
    for chip, cells in zip(CHIPS, zip(*(cells for _, cells in rows), strict=True), strict=True):
        columns.setdefault(cells, []).append(chip)
    header = [*rows[0][0], *(", ".join(chips) for chips in columns.values())]
    body = [[*names.values(), *(cells[index] for cells in columns)] for index, (names, _) in enumerate(rows)]
    return markdown(header, body)


def main(out: Path = Path("docs/kernels.md")) -> None:
    """Write the page.

    Args:
      out: where to.
    """
    out.write_text(page())


if __name__ == "__main__":
    tyro.cli(main)
