"""TOVA (arXiv 2401.06104), token omission via attention: what the newest query attends to least is evicted.

Differences from the original: pages are evicted instead of tokens, by the sum of their tokens' weights; one
set per KV head, by its group's query heads, instead of one per layer by the mean over all heads; sink pages
are kept where asked for. A prompt has full attention, and its last query decides what is left of it. The
first `dense_layers` layers evict nothing.
"""

import jax.numpy as jnp

from pallas_kernels import attention_mass
from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction, all_alive_with_mass


def latest_mass(rules, layer, query, limits):
    """The attention that the query before the newest gave."""
    return layer.kept.mass


def observe(rules, layer, q, positions, sinks):
    """The attention that the last query of the prompt gives to each page."""
    last = jnp.argmax(positions, axis=1)[:, None]
    at = jnp.take_along_axis(positions, last, axis=1)
    mass = attention_mass(
        jnp.take_along_axis(q, last[..., None, None], axis=1),
        layer.pages,
        at,
        layer.kept.alive,
        sinks,
        group_reduce=rules.group_reduce,
        implementation=rules.implementation,
    )
    return layer.kept.replace(mass=jnp.where((at >= 0)[..., None], mass, layer.kept.mass))


TOVA = Method(
    name="tova",
    title="TOVA",
    help="what the newest query attends to least goes",
    eviction=Eviction(
        init=all_alive_with_mass,
        priority=latest_mass,
        observe=observe,
        attended=lambda before, newest: newest,
        joins=True,
    ),
)
