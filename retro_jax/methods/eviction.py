"""Eviction: which pages leave a layer's cache for good, one set per KV head.

A rule gives every page a priority. Before a step loads anything, the pages of least priority go until those
that are left fit the limit; the page of the newest position and the sink pages always stay. What goes can
never be loaded again. After the load, the rule learns what attention the newest query gave to the pages that
it loaded: a page is judged by the queries before the step that drops it, as when each step evicts at its end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import selected_mass
from retro_jax.cache import Kept, LayerState
from retro_jax.models.config import ModelConfig
from retro_jax.rules import Query, Rules


@dataclass(frozen=True)
class Eviction:
    """An eviction rule.

    Attributes:
      init: (rules, model, B, P) -> what the rule carries, before any token.
      priority: (rules, layer state with the newest keys written, newest query, limits in pages[B]) ->
        finite[B, K, P]; the least are evicted, of equal ones the later. Of a rule that `grows` it counts in
        the first step after a prompt only.
      observe: (rules, layer state with the keys written, prompt queries[B, T, N, D], their positions[B, T],
        -1 for none, the layer's sinks[N] or None) -> kept, called for each chunk of a prompt. None: the
        prompt's attention does not matter.
      attended: (mass so far, mass that the newest query gave) -> new mass, both [B, K, P], of loaded pages.
        None: it does not matter.
      grows: whether only the end of a prompt evicts, and every later page stays.
      joins: whether it judges a page by what it is worth, so that `DecodeConfig.evict` can name it for a
        method that selects among what it leaves.
    """

    init: Callable[[Rules, ModelConfig, int, int], Kept]
    priority: Callable[[Rules, LayerState, Query, Int[Array, " B"]], Float[Array, "B K P"]]
    observe: Callable[[Rules, LayerState, Array, Array, Array | None], Kept] | None = None
    attended: Callable[[Array, Array], Array] | None = None
    grows: bool = False
    joins: bool = False


def all_alive(rules: Rules, model: ModelConfig, batch: int, pages: int) -> Kept:
    """Nothing evicted, nothing else remembered."""
    return Kept(alive=jnp.ones((batch, model.num_kv_heads, pages), bool))


def all_alive_with_mass(rules: Rules, model: ModelConfig, batch: int, pages: int) -> Kept:
    """Nothing evicted, no page has been attended to."""
    kept = all_alive(rules, model, batch, pages)
    return kept.replace(mass=jnp.zeros(kept.alive.shape, jnp.float32))


def evict(
    eviction: Eviction, rules: Rules, layer: LayerState, query: Query
) -> tuple[Kept, Int[Array, "B K left"], Int[Array, "B K"]]:
    """Evict down to the limit; returns what is kept, and the pages that are left, as `select_pages` does."""
    kept, P = layer.kept, layer.kept.alive.shape[2]
    limits = query.budgets
    if rules.left_pages is not None:
        limits = jnp.full_like(limits, rules.left_pages)
    priority = eviction.priority(rules, layer, query, limits)
    if eviction.grows:
        active = query.positions >= 0
        limits = jnp.where(kept.prompt.fresh, limits, jnp.where(active, P, 0))
        kept = kept.replace(prompt=kept.prompt.replace(fresh=kept.prompt.fresh & ~active))
    scores = jnp.where(kept.alive, priority, -jnp.inf)
    page_ids, counts = rules.choose(scores, query, limits, rules.left_places)
    begun = jnp.arange(P) <= (query.positions // rules.page_size)[:, None, None]
    return kept.replace(alive=kept.alive & (members(page_ids, counts, P) | ~begun)), page_ids, counts


def remember(
    eviction: Eviction,
    rules: Rules,
    layer: LayerState,
    kept: Kept,
    query: Query,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
) -> Kept:
    """Tell the rule what attention the newest query gives to the pages that it loads."""
    if eviction.attended is None:
        return kept
    mass = selected_mass(
        query.q,
        layer.pages,
        page_ids,
        counts,
        query.positions,
        query.sinks,
        group_reduce=rules.group_reduce,
        implementation=rules.implementation,
    )
    loaded = members(page_ids, counts, kept.alive.shape[2])
    return kept.replace(mass=jnp.where(loaded, eviction.attended(kept.mass, mass), kept.mass))


def members(page_ids: Int[Array, "B K C"], counts: Int[Array, "B K"], pages: int) -> Bool[Array, "B K P"]:
    """The set of the first `counts` of `page_ids` as a mask over all pages."""
    B, K, C = page_ids.shape
    ids = jnp.where(jnp.arange(C) < counts[..., None], page_ids, pages)  # `pages` lies outside: dropped
    b, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    return jnp.zeros((B, K, pages), bool).at[b, head, ids].set(True, mode="drop")
