"""Which operations of a decode step run through kernels: pairs of configuration and chip, without a chip.

    python -m retro_jax.experiments.bench.kernel_pairs --out docs/kernels.md

Each operation that a configuration asks for is asked for on each chip, as a decode step would ask there: a
kernel takes it, or refuses it with the reason that the log shows.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import (
    CODES,
    GROUP_REDUCE,
    STATISTICS,
    add_parts,
    attend_estimates,
    choose_pages,
    dense_attention,
    kernels_of_device,
    refresh_statistics,
    retro_attention,
    select_pages,
    settle_blocks,
    update_pages,
    update_ring,
    window_attention,
)
from pallas_kernels.operation import Accepted, only_asked
from retro_jax import DecodeConfig, init_state
from retro_jax.budget import most_pages, statistics_width
from retro_jax.experiments.io.tables import markdown
from retro_jax.models import LayerKind, ModelConfig
from retro_jax.plan import layer_plan
from retro_jax.selectors import LEARNED, SELECTORS

CHIPS: Mapping[str, AbstractDevice] = {
    "H100, H200": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    "v4": AbstractDevice("TPU v4", 2, "tpu"),
    "v5e": AbstractDevice("TPU v5 lite", 1, "tpu"),
    "v5p": AbstractDevice("TPU v5", 2, "tpu"),
    "v6e": AbstractDevice("TPU v6 lite", 1, "tpu"),
    "TPU7x": AbstractDevice("TPU7x", 1, "tpu"),
}
"""The chips that have kernels, as JAX describes them. Everything else runs through XLA."""
PAGE_SIZES = (4, 8, 16, 32, 64, 128)
PAGES = 1024


@dataclass(frozen=True)
class Case:
    """A configuration and the cache that it decodes from.

    Attributes:
      config: how to decode.
      group: query heads of a KV head.
      head_dim: of a key.
      dtype: of the model and its cache.
      pages: of the cache.
      batch: sequences.
      window: of a third layer, which has a sliding window; None: there is none.
      sinks: whether the layers have sinks.
    """

    config: DecodeConfig
    group: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"
    pages: int = PAGES
    batch: int = 1
    window: int | None = None
    sinks: bool = False

    @property
    def model(self) -> ModelConfig:
        """Of two KV heads, with a dense and a sparse layer."""
        windows = (None, None) if self.window is None else (None, None, self.window)
        return ModelConfig(
            name="pairs",
            vocab_size=64,
            num_layers=len(windows),
            layer_kinds=tuple(LayerKind(window=window, sinks=self.sinks) for window in windows),
            num_heads=2 * self.group,
            num_kv_heads=2,
            head_dim=self.head_dim,
            width=32,
            hidden_width=64,
            max_positions=self.capacity,
            dtype=self.dtype,
        )

    @property
    def capacity(self) -> int:
        """Tokens of the cache."""
        return self.pages * self.config.page_size


Call = tuple[Callable[..., Any], tuple[Any, ...], tuple[tuple[str, Hashable], ...]]
"""A function, its arguments as shapes, its keyword arguments."""


@functools.cache
def operations(case: Case, kernels: str) -> tuple[tuple[str, Call], ...]:
    """The operations of one decode step of a case, by what they do, on a device with these kernels."""
    return tuple(_operations(case, kernels))


def _operations(case: Case, kernels: str) -> Iterator[tuple[str, Call]]:
    config, model = case.config, case.model
    dense, sparse, *sliding = jax.eval_shape(
        functools.partial(init_state, model, config, case.batch, case.capacity)
    ).layers
    B, W, N, D = case.batch, config.slots, model.num_heads, model.head_dim
    K, P = sparse.pages.shape[1:3]
    capacity = most_pages(config, P, D, jnp.dtype(model.dtype).itemsize)

    def shape(*sizes, dtype=model.dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def integers(*sizes):
        return shape(*sizes, dtype=jnp.int32)

    def update(layer, tokens):
        """Statistics that kernels do not compute while they write are an operation of their own."""
        write, kept = (integers(B), shape(B, tokens, dtype=bool)), layer.statistics
        k = v = shape(B, tokens, K, D)
        learned = config.score == LEARNED
        fused = kept is not None and not learned and STATISTICS[kept.kind].fused_by(kernels)
        yield "update", _call(update_pages, layer.pages, kept if fused else None, k, v, *write)
        if kept is not None and not fused:
            name = "summaries" if learned else "update"
            yield name, _call(refresh_statistics, kept, layer.pages, *write)

    yield from update(dense, 1)
    sinks = (shape(N),) if case.sinks else ()
    yield "dense attention", _call(dense_attention, shape(B, 1, N, D), dense.pages, integers(B, 1), *sinks)
    for layer in sliding:
        ring = layer_plan(model, config).rings[2]
        written = shape(B, W, K, D), shape(B, W, K, D), integers(B), shape(B, W, dtype=bool)
        yield "update", _call(update_ring, layer.pages, *written, ring=ring)
        arrays = shape(B, W, N, D), layer.pages, integers(B, W), *sinks
        yield "window attention", _call(window_attention, *arrays, window=case.window, ring=ring)
    yield from update(sparse, W)
    places = {"page_size": config.page_size, "capacity": capacity, "sink_pages": config.sink_pages}
    if score := SELECTORS[config.score].by:
        width = statistics_width(config, D)
        query = shape(B, N, width), sparse.statistics, integers(B), integers(B)
        by = {"score": score, "group_reduce": config.group_reduce}
        yield "selection", _call(select_pages, *query, **by, **places)
    else:
        scores = shape(B, K, P, dtype=jnp.float32)
        yield "selection", _call(choose_pages, scores, integers(B), integers(B), **places)
    q, ids, counts = shape(B, W, N, D), integers(B, K, capacity), integers(B, K)
    outputs = sparse.outputs.o, sparse.outputs.lse
    arrays = q, sparse.pages, ids, counts, sparse.last_loaded, integers(B, W), *outputs
    yield "attention", _call(retro_attention, *arrays)
    if config.residual_pages:
        arrays = sparse.block_values, sparse.pages, integers(B), integers(B)
        yield "block values", _call(settle_blocks, *arrays, block_pages=config.residual_pages, count=1)
        arrays = q, sparse.statistics, sparse.block_values, sparse.last_loaded, integers(B, W), integers(B)
        sizes = {"page_size": config.page_size, "block_pages": config.residual_pages}
        yield "estimates", _call(attend_estimates, *arrays, **sizes)
    if kernels == "mosaic_gpu":  # on TPUs they are XLA's
        stream, norm = shape(B, W, model.width), shape(model.width)
        yield "additions", _call(add_parts, stream, shape(1, *stream.shape), norm, norm, eps=model.norm_eps)


def _call(function, *arrays, **options) -> Call:
    return function, arrays, tuple(sorted(options.items()))


def on_chip(chip: str) -> Any:
    """A context in which everything is traced for one device of an absent chip."""
    return use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=CHIPS[chip]))


def refusals(case: Case, chip: str) -> dict[str, str]:
    """What of a decode step runs through XLA on a chip, and why: reasons by what the operation does."""
    found: dict[str, str] = {}
    with on_chip(chip):
        kernels = kernels_of_device()
    for name, call in operations(case, kernels):
        reason = _refusal(chip, *_hashable(call))
        if reason is not None:
            found.setdefault(name, reason)
    return found


def _hashable(call: Call) -> tuple:
    function, arrays, options = call
    leaves, structure = jax.tree.flatten(arrays)
    return function, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves), structure, options


@functools.cache
def _refusal(chip, function, leaves, structure, options) -> str | None:
    arrays = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    with on_chip(chip), only_asked():
        asked = functools.partial(function, implementation=kernels_of_device(), **dict(options))
        try:
            jax.eval_shape(asked, *arrays)
        except Accepted:
            return None
        except NotImplementedError as error:
            return str(error.__cause__ or error).partition(" (xla")[0]
    raise AssertionError(f"{function.__name__} neither took its arguments nor refused them")


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
