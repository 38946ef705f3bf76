"""What a dense pass leaves of a cache: that of full attention, with page statistics that follow it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import refresh_statistics
from pallas_kernels.settings import under_fixed_settings
from retro_jax.cache import LayerState
from retro_jax.config import DecodeConfig
from retro_jax.layers import settle
from retro_jax.learned import refresh_summaries
from retro_jax.models import LearnedScore
from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.selectors import LEARNED
from retro_jax.state import DecodeState


@under_fixed_settings
def keep(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    rows: int,
) -> DecodeState:
    """The state of an exact cache with `counts` tokens from position `start` on, and none behind them.

    Page statistics follow, and the window is empty. A sequence whose count is 0 is left as it is, but for its
    length, which becomes `start`.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to decode; static.
      state: whose pages hold at least these tokens.
      start: tokens whose statistics are up to date.
      counts: 0..rows.
      rows: static.
    """
    stack = zip(params.layers, model.layers, state.layers, strict=True)
    layers = (
        _keep_in_layer(layer.page_score, model, kind, config, cache, start, counts, rows)
        for layer, kind, cache in stack
    )
    return state.replace(
        length=start + counts, decoded=jnp.where(counts > 0, 0, state.decoded), layers=tuple(layers)
    )


@functools.partial(jax.jit, static_argnames=("model", "kind", "config", "rows"))
def _keep_in_layer(
    score: LearnedScore | None,
    model: ModelConfig,
    kind: LayerKind,
    config: DecodeConfig,
    cache: LayerState,
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    rows: int,
) -> LayerState:
    """The statistics and the block values of the tokens that are kept, from their pages."""
    if cache.statistics is not None:
        refresh = refresh_statistics
        if config.score == LEARNED:
            refresh = functools.partial(refresh_summaries, score, model, kind)
        kept = jnp.arange(rows) < counts[:, None]  # in a few pages: through XLA
        statistics = refresh(cache.statistics, cache.pages, start, kept, implementation="xla")
        cache = cache.replace(statistics=statistics)
    if cache.block_values is not None:
        tokens = rows + config.residual_pages * config.page_size
        cache = settle(config, cache, start, start + counts, tokens)
    return cache
