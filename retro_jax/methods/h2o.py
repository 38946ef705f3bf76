"""H2O (arXiv 2306.14048): heavy hitters, which got most attention of all queries so far, and recent tokens.

Half of the pages that fit are recent ones, the others those with most attention, as in the original.

Differences from the original: pages are evicted instead of tokens, by the sum of their tokens' weights; one
set per KV head, by its group's query heads; sink pages are kept where asked for. The prompt has full
attention, all of its queries count, and nothing is evicted before its end. The first `dense_layers` layers
evict nothing.
"""

import jax.numpy as jnp

from pallas_kernels import attention_mass
from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction, all_alive_with_mass


def heavy_or_recent(rules, layer, query, limits):
    """The attention that a page got so far; recent pages come before any other."""
    kept = layer.kept
    page, newest = jnp.arange(kept.alive.shape[2]), query.positions // rules.page_size
    recent = jnp.minimum(limits // 2, limits - rules.sink_pages)
    recent = page > (newest - recent)[:, None, None]
    return jnp.where(recent, jnp.finfo(jnp.float32).max, kept.mass)


def observe(rules, layer, q, positions, sinks):
    """Adds the attention that all queries of the prompt give."""
    by = {"group_reduce": rules.group_reduce, "implementation": rules.implementation}
    mass = attention_mass(q, layer.pages, positions, layer.kept.alive, sinks, **by)
    return layer.kept.replace(mass=layer.kept.mass + mass)


H2O = Method(
    name="h2o",
    title="H2O",
    help="what all queries attended to most stays, and recent pages",
    eviction=Eviction(
        init=all_alive_with_mass,
        priority=heavy_or_recent,
        observe=observe,
        attended=lambda before, newest: before + newest,
        joins=True,
    ),
)
