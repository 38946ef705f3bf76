"""Which pages a sparse layer loads: those that its method selects, fewer, or what was selected elsewhere.

Three fields change what any method that scores pages loads, with every window:

- `budget_top_p`: of the pages within the budget only the fewest whose estimated shares of attention reach p,
  as Twilight (arXiv 2502.02770) prunes what another method has selected. Differences: shares are estimated
  from the page statistics that the score reads, not from 4-bit keys of every token; pages are pruned, not
  tokens; one set per KV head, by the mean of its query heads.
- `anchor_every`: only every n-th sparse layer selects, and those above it load the same pages, as in
  LessIsMore (arXiv 2508.07101) and Kascade (arXiv 2512.16391). Differences: anchors are evenly spaced, where
  Kascade looks for them by a dynamic program; pages are selected by the method's score, where both select
  tokens by exact attention in those layers; each KV head has a set of its own, where LessIsMore makes one of
  all heads, and takes over that of the head of its number, where Kascade maps heads to similar ones.
- `select_every`: a step loads what an earlier token has selected; every n tokens one selects anew.
"""

from dataclasses import replace

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from retro_jax.cache import Kept, LayerState
from retro_jax.config import DecodeConfig
from retro_jax.methods.eviction import evict, remember
from retro_jax.rules import Query, Rules
from retro_jax.selectors import SELECTORS


@flax.struct.dataclass
class Selection:
    """The pages that a sparse layer loads.

    Attributes:
      page_ids: in the first `counts` places.
      counts: how many there are.
      fresh: whether this layer selected them in this step, and so read what it scores pages by; False in a
        sequence that is not active.
    """

    page_ids: Int[Array, "B K C"]
    counts: Int[Array, "B K"]
    fresh: Bool[Array, " B"]


def choose(
    config: DecodeConfig, rules: Rules, cache: LayerState, query: Query, below: Selection | None
) -> tuple[Selection, Kept | None]:
    """The pages that a layer loads: what its method selects among those that eviction leaves, or all of them.

    Args:
      config: how to decode.
      rules: of the configuration in this cache.
      cache: the layer's state, the newest keys written.
      query: the newest.
      below: what the layer's anchor loads; None in an anchor.

    Returns:
      The pages, and what eviction keeps.
    """
    if below is not None:
        return below.replace(fresh=jnp.zeros_like(below.fresh)), cache.kept
    if cache.kept is None:
        return _select(config, rules, cache, query, None), None
    kept, page_ids, counts = evict(config.eviction, rules, cache, query)
    selection = Selection(page_ids, counts, query.positions >= 0)
    if config.attention.select:
        selection = _select(config, rules, cache, query, kept.alive)
    page_ids, counts = selection.page_ids, selection.counts
    return selection, remember(config.eviction, rules, cache, kept, query, page_ids, counts)


def _select(
    config: DecodeConfig, rules: Rules, cache: LayerState, query: Query, left: Bool[Array, "B K P"] | None
) -> Selection:
    """The method's pages among those that are left, or an earlier token's."""

    def anew():
        page_ids, counts = config.attention.select(rules, cache, query, left)
        if config.budget_top_p is not None:
            page_ids, counts = fewest(rules, cache, query, page_ids, counts, config.budget_top_p)
        return page_ids, counts

    active = query.positions >= 0
    if config.select_every == 1:
        return Selection(*anew(), active)
    pages, known = earlier(cache, query, config.select_every)
    fresh = active & ~known
    if left is not None:
        pages &= left
    by_age = jnp.where(pages, jnp.arange(pages.shape[2], dtype=jnp.float32), -jnp.inf)
    taken_over = rules.choose(by_age, query)

    def mixed():
        of_each = fresh[:, None, None], fresh[:, None]
        return tuple(map(jnp.where, of_each, anew(), taken_over))

    # Statistics are read only where some sequence needs it.
    return Selection(*lax.cond(jnp.any(fresh), mixed, lambda: taken_over), fresh)


def earlier(cache: LayerState, query: Query, every: int) -> tuple[Bool[Array, "B K P"], Bool[Array, " B"]]:
    """The pages that a step can take over from earlier tokens, and whether there are any.

    Positions that `every` divides select anew, as does the first decoded token behind a prompt. Steps after
    that load what it has loaded, and the pages that have begun since. What was loaded since is told by
    `last_loaded`: nothing else has to be remembered. Where the budget has no room for all of them, pages that
    are not forced make it, the earliest in the text first.
    """
    at = query.positions - query.positions % every
    last = cache.last_loaded
    loaded = (last >= at[:, None, None]) & (last < query.positions[:, None, None])
    page = jnp.arange(last.shape[2])
    begun = page > jnp.max(jnp.where(loaded, page, -1), axis=2, keepdims=True)  # after the newest page then
    return loaded | begun, jnp.any(loaded, axis=(1, 2))


def fewest(
    rules: Rules,
    cache: LayerState,
    query: Query,
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    top_p: float,
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """Of selected pages the fewest whose estimated shares of attention reach `top_p`; forced pages stay.

    A share is that of `group_reduce="mass"`: each query head's softmax of its scores, taken as logits of
    whole pages, over all pages before the newest; the mean of the group's heads. The newest page has none.
    Where all selected pages together do not reach `top_p`, all of them stay.

    Args:
      rules: page size, sink pages and score.
      cache: the layer's state.
      query: the newest.
      page_ids: the selected pages, those that are forced among them.
      counts: how many of them count.
      top_p: in (0, 1).
    """
    newest = (query.positions // rules.page_size)[:, None, None]
    before = jnp.broadcast_to(jnp.arange(cache.pages.shape[2]) < newest, cache.pages.shape[:3])
    by_mass = replace(rules, group_reduce="mass")
    shares = SELECTORS[rules.score].scores(by_mass, cache, query, before)
    selected = jnp.arange(page_ids.shape[2]) < counts[..., None]
    share = jnp.where(selected, jnp.take_along_axis(shares, page_ids, axis=2, mode="clip"), 0.0)
    share = jnp.where(page_ids == newest, 0.0, share)
    forced = (page_ids == newest) | (page_ids < rules.sink_pages)
    rank = jnp.where(selected, jnp.where(forced, -jnp.inf, -share), jnp.inf)
    rank, page_ids, share = lax.sort((rank, page_ids, share), num_keys=2)  # ties to the lower page
    reached = jnp.cumsum(share, axis=2)
    before_it = jnp.pad(reached[..., :-1], ((0, 0), (0, 0), (1, 0)))
    needed = (rank < jnp.inf) & ((before_it < top_p) | (rank == -jnp.inf))
    return page_ids, jnp.sum(needed, axis=2, dtype=counts.dtype)
