"""Eviction: which pages leave a layer's cache for good, one set per KV head.

A rule gives every page a priority. Before a step loads anything, the pages of least priority go until those
that are left fit the limit; the page of the newest position and the sink pages always stay. What goes can
never be loaded again. After the load, the rule learns what attention the newest query gave to the pages that
it loaded: a page is judged by the queries before the step that drops it, as when each step evicts at its end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import choose_pages, selected_mass
from retro_jax.budget import most_kept_pages
from retro_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from retro_jax.config import DecodeConfig
    from retro_jax.methods.base import Query
    from retro_jax.state import LayerState


@flax.struct.dataclass
class Prompt:
    """What is kept of a prompt until its end is known.

    Attributes:
      queries: the last queries of the prompt, oldest first.
      at: their positions, -1 for none.
      fresh: whether no token has been decoded since the prompt.
    """

    queries: Float[Array, "B observed N D"]
    at: Int[Array, "B observed"]
    fresh: Bool[Array, " B"]


@flax.struct.dataclass
class Kept:
    """What an eviction rule carries in one sparse layer.

    Attributes:
      alive: pages that were not evicted; those that have not begun are.
      mass: what attention each page got, as the rule counts it; None where it does not ask.
      prompt: for rules that evict at the end of a prompt only.
    """

    alive: Bool[Array, "B K P"]
    mass: Float[Array, "B K P"] | None = None
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Eviction:
    """An eviction rule.

    Attributes:
      init: (config, model, B, P) -> what the rule carries, before any token.
      priority: (config, kept, newest query, limits in pages[B]) -> finite[B, K, P]; the least are evicted, of
        equal ones the later.
      observe: (config, layer state with the keys written, prompt queries[B, T, N, D], their positions[B, T],
        -1 for none) -> kept, called for each chunk of a prompt. None: the prompt's attention does not matter.
      attended: (mass so far, mass that the newest query gave) -> new mass, both [B, K, P], of loaded pages.
        None: it does not matter.
      grows: whether only the end of a prompt evicts, and every later page stays.
    """

    init: Callable[["DecodeConfig", ModelConfig, int, int], Kept]
    priority: Callable[["DecodeConfig", Kept, "Query", Int[Array, " B"]], Float[Array, "B K P"]]
    observe: Callable[["DecodeConfig", "LayerState", Array, Array], Kept] | None = None
    attended: Callable[[Array, Array], Array] | None = None
    grows: bool = False


def all_alive(config: "DecodeConfig", model: ModelConfig, batch: int, pages: int) -> Kept:
    """Nothing evicted, nothing else remembered."""
    return Kept(alive=jnp.ones((batch, model.num_kv_heads, pages), bool))


def all_alive_with_mass(config: "DecodeConfig", model: ModelConfig, batch: int, pages: int) -> Kept:
    """Nothing evicted, no page has been attended to."""
    kept = all_alive(config, model, batch, pages)
    return kept.replace(mass=jnp.zeros(kept.alive.shape, jnp.float32))


def evict(
    config: "DecodeConfig", kept: Kept, query: "Query"
) -> tuple[Kept, Int[Array, "B K kept"], Int[Array, "B K"]]:
    """Evict down to the limit; returns what is kept, and the pages that are left, as `select_pages` does."""
    rule, P = config.eviction, kept.alive.shape[2]
    limits = config.kept_pages(query.budgets)
    priority = rule.priority(config, kept, query, limits)
    if rule.grows:
        active = query.positions >= 0
        limits = jnp.where(kept.prompt.fresh, limits, jnp.where(active, P, 0))
        kept = kept.replace(prompt=kept.prompt.replace(fresh=kept.prompt.fresh & ~active))
    page_ids, counts = choose_pages(
        jnp.where(kept.alive, priority, -jnp.inf),
        query.positions,
        limits,
        page_size=config.page_size,
        capacity=most_kept_pages(config, P, query.q.shape[-1], query.q.dtype.itemsize),
        sink_pages=config.sink_pages,
        implementation=config.implementation,
    )
    begun = jnp.arange(P) <= (query.positions // config.page_size)[:, None, None]
    return kept.replace(alive=kept.alive & (members(page_ids, counts, P) | ~begun)), page_ids, counts


def remember(
    config: "DecodeConfig",
    layer: "LayerState",
    kept: Kept,
    query: "Query",
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
) -> Kept:
    """Tell the rule what attention the newest query gives to the pages that it loads."""
    attended = config.eviction.attended
    if attended is None:
        return kept
    mass = selected_mass(
        query.q, layer.pages, page_ids, counts, query.positions, group_reduce=config.group_reduce
    )
    loaded = members(page_ids, counts, kept.alive.shape[2])
    return kept.replace(mass=jnp.where(loaded, attended(kept.mass, mass), kept.mass))


def load_what_is_left(
    config: "DecodeConfig", layer: "LayerState", query: "Query"
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"], Kept]:
    """The `select` of methods that only evict: every page that is left is loaded."""
    kept, page_ids, counts = evict(config, layer.kept, query)
    return page_ids, counts, remember(config, layer, kept, query, page_ids, counts)


def members(page_ids: Int[Array, "B K C"], counts: Int[Array, "B K"], pages: int) -> Bool[Array, "B K P"]:
    """The set of the first `counts` of `page_ids` as a mask over all pages."""
    B, K, C = page_ids.shape
    ids = jnp.where(jnp.arange(C) < counts[..., None], page_ids, pages)  # `pages` lies outside: dropped
    b, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    return jnp.zeros((B, K, pages), bool).at[b, head, ids].set(True, mode="drop")
