"""StreamingLLM (arXiv 2309.17453): the first tokens, attention's sinks, and a window of recent ones.

Differences from the original: both are made of whole pages. Keys keep the rotary position that they have in
the text, where the original counts positions within its cache: nothing has to be rotated again, and up to the
model's trained length, which the cache does not exceed, distances are those that the model knows. The first
`dense_layers` layers and the prompt have full attention.
"""

import jax.numpy as jnp

from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction, all_alive


def recency(rules, layer, query, limits):
    """A page's number: the first ones are evicted first."""
    shape = layer.kept.alive.shape
    return jnp.broadcast_to(jnp.arange(shape[2], dtype=jnp.float32), shape)


STREAMING = Method(
    name="streaming",
    title="StreamingLLM",
    help="sink pages and recent ones",
    eviction=Eviction(init=all_alive, priority=recency),
)
