"""Attention methods, one file each.

A method is a `Method` in a file of its own and a line in `METHODS`; `tests/retro_jax/test_methods.py` picks
it up from there. Those that evict share `eviction`.
"""

from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction
from retro_jax.methods.full import FULL
from retro_jax.methods.h2o import H2O
from retro_jax.methods.quest import QUEST
from retro_jax.methods.retro import RETRO
from retro_jax.methods.snapkv import SNAPKV
from retro_jax.methods.streaming import STREAMING
from retro_jax.methods.tova import TOVA

METHODS: dict[str, Method] = {
    method.name: method for method in (FULL, QUEST, RETRO, STREAMING, TOVA, H2O, SNAPKV)
}

__all__ = [
    "METHODS",
    "Eviction",
    "Method",
]
