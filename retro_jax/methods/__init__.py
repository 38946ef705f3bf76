"""Attention methods, one file each.

A method is a `Method` in a file of its own and a line in `METHODS`; `tests/retro_jax/test_methods.py` picks
it up from there. `register_method` takes one from outside. Those that evict share `eviction`.
"""

from retro_jax.methods.base import Method
from retro_jax.methods.eviction import Eviction
from retro_jax.methods.expected import EXPECTED
from retro_jax.methods.full import FULL
from retro_jax.methods.h2o import H2O
from retro_jax.methods.quest import QUEST
from retro_jax.methods.retro import RETRO
from retro_jax.methods.snapkv import SNAPKV
from retro_jax.methods.streaming import STREAMING
from retro_jax.methods.tova import TOVA

METHODS: dict[str, Method] = {
    method.name: method for method in (FULL, QUEST, RETRO, STREAMING, TOVA, H2O, SNAPKV, EXPECTED)
}


def register_method(method: Method) -> None:
    """Make a method known to `DecodeConfig`, and so to all that decodes.

    A method whose steps load the sink pages, the newest page, and of the others every fourth:

        import jax.numpy as jnp
        import retro_jax as rj

        def every_fourth(rules, layer, query, left):
            page = jnp.arange(layer.pages.shape[2])
            scores = jnp.where(page % 4 == 0, page, -1.0)  # the later first, the others last
            return rules.choose(jnp.broadcast_to(scores, layer.pages.shape[:3]), query)

        STRIDED = rj.Method("strided", title="Strided", help="every fourth page", select=every_fourth)
        rj.register_method(STRIDED)
        config = rj.DecodeConfig(method="strided", budget_tokens=128)

    A name means its method for the rest of the process, as compiled programs are told apart by it. A test
    that is to leave nothing behind registers within `unittest.mock.patch.dict(METHODS)`, under a name of its
    own. Of several processes that share a mesh, each registers it.

    Args:
      method: whose name is `DecodeConfig.method` from now on.

    Raises:
      TypeError: it is not a `Method`.
      ValueError: the name is taken.
    """
    if not isinstance(method, Method):
        raise TypeError(f"{method!r} is a {type(method).__name__}; give a retro_jax.Method")
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is there already; use a name beside {', '.join(METHODS)}")
    METHODS[method.name] = method


__all__ = ["METHODS", "Eviction", "Method", "register_method"]
