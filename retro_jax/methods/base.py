"""What a method decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import flax.struct
from jaxtyping import Array, Float, Int

from retro_jax.methods.eviction import Eviction, Kept

if TYPE_CHECKING:
    from retro_jax.config import DecodeConfig
    from retro_jax.state import LayerState


@flax.struct.dataclass
class Query:
    """The newest query of one sparse layer.

    Attributes:
      q: of every head, rotary embedding applied.
      positions: its position, -1 in a sequence that is not active.
      budgets: pages that it may load; 0 in a sequence that is not active.
      layer: which layer of the model it is.
    """

    q: Float[Array, "B N D"]
    positions: Int[Array, " B"]
    budgets: Int[Array, " B"]
    layer: Int[Array, ""] | int


Select = Callable[
    ["DecodeConfig", "LayerState", Query], tuple[Int[Array, "B K C"], Int[Array, "B K"], Kept | None]
]


@dataclass(frozen=True)
class Method:
    """An attention method.

    Attributes:
      name: as in `DecodeConfig.method`.
      select: which pages a sparse layer loads: (config, layer state with the newest keys written, newest
        query) -> (page_ids[B, K, C], counts[B, K], the new `LayerState.kept`), where a budget of 0 must give
        a count of 0. None: every layer is dense.
      scored: whether it selects by `DecodeConfig.score`, among the pages that `DecodeConfig.evict` leaves.
      eviction: the rule by which pages leave the cache for good. None: none does.
      default_window: W where the configuration gives none.
      revises: whether windows beyond 1, which revise past queries, make sense.
    """

    name: str
    select: Select | None
    scored: bool = False
    eviction: Eviction | None = None
    default_window: int = 1
    revises: bool = False

    @property
    def dense(self) -> bool:
        """Whether every layer uses full attention."""
        return self.select is None
