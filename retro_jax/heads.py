"""The heads of a layer's tokens: queries, and keys and values as they are written into the cache.

Heads are XLA's until they are written. On Hopper GPUs a kernel does all that follows the joined product in
one launch, the sum of its parts too.
"""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import depth_splits, ring_places, update_from_product, update_pages, update_ring
from pallas_kernels.dispatch import kernels_of_device
from pallas_kernels.pages import Pages
from retro_jax.cache import LayerState
from retro_jax.config import DecodeConfig
from retro_jax.learned import learned_score, refresh_summaries
from retro_jax.models import transformer
from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.rope import rotation
from retro_jax.models.transformer import LayerParams


def write_heads(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    config: DecodeConfig,
    cache: LayerState,
    h: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Float[Array, "B T N D"], LayerState]:
    """Queries of T consecutive tokens, and the layer's state with their keys and values written.

    Page statistics follow what is written.

    Args:
      layer: weights.
      model: sizes.
      kind: of this layer.
      config: how to decode.
      cache: this layer's state.
      h: hidden states, normed.
      positions: of the tokens, -1 for one without a query.
      start: position of the first of them.
      write: those whose keys and values are written, over stale ones where there are any.
      implementation: of the operations on pages.
    """
    score = None if cache.statistics is None else learned_score(layer, config)
    fused = None if score else _fused(layer, model, kind, positions, implementation)
    if fused:
        parts = _joined_parts(layer, h, implementation)
        q, pages, statistics = fused(cache.pages, cache.statistics, parts, start, write)
        return q, cache.replace(pages=pages, statistics=statistics)
    joined = transformer.joined_heads(layer, h)
    q, k, v = transformer.split_heads(layer, model, kind, joined, positions)
    pages, statistics = update_pages(
        cache.pages,
        None if score else cache.statistics,
        k,
        v,
        start,
        write,
        implementation=implementation,
    )
    if score:
        statistics = refresh_summaries(
            score, model, kind, cache.statistics, pages, start, write, implementation=implementation
        )
    return q, cache.replace(pages=pages, statistics=statistics)


def write_ring_heads(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    ring: int,
    pages: Pages,
    h: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
    implementation: str | None,
) -> tuple[Float[Array, "B T N D"], Pages]:
    """`write_heads` into a ring of so many places, of no more tokens than that."""
    fused = _fused(layer, model, kind, positions, implementation)
    if fused is None:
        joined = transformer.joined_heads(layer, h)
        q, k, v = transformer.split_heads(layer, model, kind, joined, positions)
        return q, update_ring(pages, k, v, start, write, ring=ring, implementation=implementation)
    parts = _joined_parts(layer, h, implementation)
    for place, some in ring_places(start, write, ring):
        q, pages, _ = fused(pages, None, parts, place, some)
    return q, pages


def _joined_parts(
    layer: LayerParams, h: Float[Array, "B T M"], implementation: str | None
) -> Float[Array, "parts B rows QKV"]:
    rows, depth = h.shape[0] * h.shape[1], h.shape[2]
    splits = depth_splits(rows, depth, h.dtype, implementation, whole_depth=True)
    return transformer.split_product(h, layer.wqkv, splits)


def _fused(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    positions: Int[Array, "B T"],
    implementation: str | None,
) -> Callable | None:
    """`update_from_product` of pages, statistics, product, start, write; None where that is no kernel's."""
    some_channels = kind.rope is not None and kind.rope.channels not in (None, model.head_dim)
    kernels = implementation or kernels_of_device()
    if kernels != "mosaic_gpu" or model.joint_qk_norm or some_channels:
        return None
    cos = sin = None
    if kind.rope is not None:
        cos, sin = rotation(positions, kind.rope, model.head_dim, model.max_positions)

    def fused(pages, statistics, parts, start, write):
        return update_from_product(
            pages,
            statistics,
            parts,
            layer.bqkv,
            layer.q_norm,
            layer.k_norm,
            cos,
            sin,
            start,
            write,
            part_heads=model.num_kv_heads // model.parts,
            norm_eps=model.norm_eps,
            q_scale=transformer.query_scale(model, kind),
            dtype=model.dtype,
            implementation=implementation,
        )

    return fused
