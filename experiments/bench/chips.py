"""Which operations of a decode step the kernels of a chip take, asked for without the chip."""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import (
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
