"""Attention methods, one file each.

A method is a `Method` in a file of its own and a line in `METHODS`; `tests/retro_jax/test_methods.py` picks
it up from there.
"""

from collections.abc import Mapping

from retro_jax.methods.base import Method
from retro_jax.methods.full import FULL
from retro_jax.methods.quest import QUEST
from retro_jax.methods.retro import RETRO

METHODS: Mapping[str, Method] = {method.name: method for method in (FULL, QUEST, RETRO)}

__all__ = ["METHODS", "Method"]
