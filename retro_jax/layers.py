"""One layer of a decode step: dense for the newest token, or sparse for the whole window.

Layers of one kind differ in their arrays only, so each kind is a function under `jax.jit` of its own: a
program of many layers traces and lowers it once and calls it for each. XLA inlines the calls, so that what it
compiles is the same.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import (
    Mailbox,
    attend_estimates,
    attend_pages,
    attend_window,
    dense_attention,
    merge,
    merge_sinks,
    settle_blocks,
)
from retro_jax.budget import budget_pages, rules_of
from retro_jax.cache import LayerState, OutputCache
from retro_jax.config import DecodeConfig
from retro_jax.heads import write_heads
from retro_jax.learned import learned_queries, learned_score
from retro_jax.mlp import after_attention
from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.transformer import LayerParams
from retro_jax.rules import Query, Rules
from retro_jax.selection import Selection, choose
from retro_jax.state import DecodeState
from retro_jax.stream import Norm, Stream


@flax.struct.dataclass
class Window:
    """The queries of one step in one sparse layer, oldest first, and what they have found so far.

    Attributes:
      q: rotary embedding applied; an older slot's is that of its corrected hidden state.
      o: attention outputs, those of older slots revised, as they go on to the output projection.
    """

    q: Float[Array, "B W N D"]
    o: Float[Array, "B W N D"]


Watch = Callable[[Rules, LayerState, Query, Window], Any]
"""What an analysis does in each sparse layer: (rules, the layer's new state, newest query, window) -> a
pytree. A function of a module: programs are told apart by it."""


@flax.struct.dataclass
class Slots:
    """The window of one step.

    Attributes:
      start: position of the oldest slot; negative where the sequence is shorter than the window.
      valid: slots that hold a decoded token of an active sequence.
      budgets: pages that each sequence may load in a sparse layer; 0 if it is not active.
      settled: tokens older than every slot: the position of the oldest valid one; 0 if it is not active.
    """

    start: Int[Array, " B"]
    valid: Bool[Array, "B W"]
    budgets: Int[Array, " B"]
    settled: Int[Array, " B"]

    @property
    def positions(self) -> Int[Array, "B W"]:
        """Each slot's position, -1 where it is not valid."""
        return jnp.where(self.valid, self.start[:, None] + jnp.arange(self.valid.shape[1]), -1)

    @property
    def newest(self) -> Bool[Array, "B W"]:
        """`valid` for the newest slot only."""
        return self.valid & (jnp.arange(self.valid.shape[1]) == self.valid.shape[1] - 1)

    def last(self, window: int) -> "Slots":
        """The newest `window` slots."""
        start = self.start + self.valid.shape[1] - window
        valid = self.valid[:, -window:]
        oldest = start + window - jnp.sum(valid, axis=1)
        return self.replace(start=start, valid=valid, settled=jnp.where(valid[:, -1], oldest, 0))


def window_slots(config: DecodeConfig, state: DecodeState, active: Bool[Array, " B"]) -> Slots:
    """The window of the step that decodes the token at position `state.length`."""
    W, head_dim = config.slots, state.layers[0].pages.shape[-1]
    age = jnp.arange(W - 1, -1, -1)
    itemsize = state.hidden.dtype.itemsize  # the model's, unlike that of pages in 8 bits
    budgets = budget_pages(config, state.budget, state.length + 1, head_dim, itemsize)
    return Slots(
        start=state.length - (W - 1),
        valid=(age <= state.decoded[:, None]) & active[:, None],
        budgets=jnp.where(active, budgets, 0),
        settled=jnp.where(active, state.length - state.decoded, 0),
    )


@functools.partial(jax.jit, static_argnames=("model", "kind", "config", "implementation"))
def dense_layer(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    config: DecodeConfig,
    cache: LayerState,
    stream: Stream,
    norm: Norm,
    start: Int[Array, " B"],
    valid: Bool[Array, "B T"],
    implementation: str | None,
    mailbox: Mailbox | None = None,
) -> tuple[Stream, LayerState, Float[Array, " B"] | None]:
    """A layer with full attention for T consecutive tokens from position `start` on.

    Writes keys and values of the valid ones. In a sparse layer, which prefill runs densely, page statistics
    follow, and what eviction carries; pages that were evicted earlier stay away. `norm` is that of what comes
    behind the layer, `implementation` that of the operations, `mailbox` of sums over devices. The last result
    is what `mlp` says of experts.
    """
    T, dtype = stream.h.shape[1], stream.h.dtype
    positions = jnp.where(valid, start[:, None] + jnp.arange(T), -1)
    tokens = stream.h, positions, start, valid
    q, cache = write_heads(layer, model, kind, config, cache, *tokens, implementation)
    pages = cache.pages
    if cache.block_values is not None:
        # Also of the tokens that were in the window before these, which empty it.
        unsettled = config.slots - 1
        settled = start + jnp.sum(valid, axis=1)
        reach = T + unsettled + config.residual_pages * config.page_size
        cache = settle(config, cache, start - unsettled, settled, reach)
    if cache.kept is None:
        o = dense_attention(q, pages, positions, layer.sinks, dtype=dtype, implementation=implementation)
    else:
        alive = cache.kept.alive
        o = attend_pages(q, pages, positions, alive, layer.sinks, implementation=implementation)
        if config.eviction.observe:
            rules = _rules(model, kind, config, cache)
            cache = cache.replace(kept=config.eviction.observe(rules, cache, q, positions, layer.sinks))
    stream, experts = after_attention(layer, model, stream, o, valid, norm, implementation, mailbox)
    return stream, cache, experts


@functools.partial(jax.jit, static_argnames=("model", "kind", "config", "watch"))
def sparse_layer(
    layer: LayerParams,
    model: ModelConfig,
    kind: LayerKind,
    config: DecodeConfig,
    cache: LayerState,
    stream: Stream,
    norm: Norm,
    slots: Slots,
    write: Bool[Array, "B W"],
    index: Int[Array, ""] | int,
    below: Selection | None = None,
    watch: Watch | None = None,
    mailbox: Mailbox | None = None,
) -> tuple[
    Stream,
    LayerState,
    Selection,
    Int[Array, "B K C"] | None,
    Any,
    Float[Array, " B"] | None,
]:
    """A sparse layer for the whole window (RetroAttention, section 3 and algorithm 1).

    Args:
      layer: weights.
      model: sizes.
      kind: of this layer.
      config: method and budget.
      cache: this layer's state.
      stream: hidden states of all slots as the layer below now sees them.
      norm: of what comes behind the layer.
      slots: positions, validity and budgets.
      write: slots whose keys and values are written, over stale ones where there are any.
      index: which layer of the model it is.
      below: the pages of the layer's anchor, which it loads too; None: it selects its own.
      watch: an analysis; None: none.
      mailbox: for sums over devices; None: XLA's.

    Returns:
      The corrected hidden states, the new state, the pages that were loaded, the positions from which on
      queries newly attend to them (see `attend_window`; None without older slots), what `watch` returned, and
      what `mlp` says of experts.
    """
    positions = slots.positions
    # Overwrite the stale keys and values of past queries; append the newest.
    tokens = stream.h, positions, slots.start, write
    q, cache = write_heads(layer, model, kind, config, cache, *tokens, config.implementation)
    if below is not None:
        # What to read is known before: XLA would write on the way, and keep a copy of the pages for it.
        cache = cache.replace(pages=lax.optimization_barrier(cache.pages))
    pages = cache.pages

    # Select pages for the newest query; one load of them serves the window.
    newest, score = q[:, -1], learned_score(layer, config)
    scored = newest if score is None else learned_queries(score, model, kind, newest, positions[:, -1])
    query = Query(newest, positions[:, -1], slots.budgets, index, scored, layer.sinks)
    selection, kept = choose(config, _rules(model, kind, config, cache), cache, query, below)
    page_ids, counts = selection.page_ids, selection.counts
    # Outputs that nothing else is done with have the digits that the projection takes.
    final = layer.sinks is None and not config.residual_pages and watch is None
    o, lse, last_loaded, *outputs, attending = attend_window(
        q,
        pages,
        page_ids,
        counts,
        cache.last_loaded,
        positions,
        cache.outputs.o,
        cache.outputs.lse,
        slots.valid[:, -1],
        dtype=stream.h.dtype if final else jnp.float32,
        implementation=config.implementation,
    )

    # What the output cache keeps is exact, and without the sinks; estimates of what is missing and then the
    # sinks are merged anew in each step.
    attention, total = o, lse
    if config.residual_pages:
        size = config.residual_pages * config.page_size
        cache = settle(config, cache, slots.settled - size, slots.settled, size)
        estimates = attend_estimates(
            q,
            cache.statistics,
            cache.block_values,
            last_loaded,
            positions,
            slots.settled,
            page_size=config.page_size,
            block_pages=config.residual_pages,
            implementation=config.implementation,
        )
        attention, total = merge(o, lse, *estimates)
    attention = merge_sinks(attention, total, layer.sinks)

    after = attention, slots.valid, norm, config.implementation, mailbox
    stream, experts = after_attention(layer, model, stream, *after)
    cache = cache.replace(last_loaded=last_loaded, outputs=OutputCache(*outputs), kept=kept)
    seen = watch and watch(_rules(model, kind, config, cache), cache, query, Window(q, attention))
    return stream, cache, selection, attending, seen, experts


def _rules(model: ModelConfig, kind: LayerKind, config: DecodeConfig, cache: LayerState) -> Rules:
    rules = rules_of(config, cache.pages.shape[2], model.head_dim, jnp.dtype(model.dtype).itemsize)
    return replace(rules, rope=kind.rope, max_positions=model.max_positions)


def settle(
    config: DecodeConfig,
    cache: LayerState,
    first: Int[Array, " B"],
    settled: Int[Array, " B"],
    tokens: int,
) -> LayerState:
    """The state with the values of the blocks that have settled among `tokens` tokens from `first` on."""
    size = config.residual_pages * config.page_size
    return cache.replace(
        block_values=settle_blocks(
            cache.block_values,
            cache.pages,
            first,
            settled,
            block_pages=config.residual_pages,
            count=-(-tokens // size),
            implementation=config.implementation,
        )
    )
