"""What a method decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from retro_jax.config import DecodeConfig
    from retro_jax.state import LayerState

Select = Callable[
    ["DecodeConfig", "LayerState", Float[Array, "B N D"], Int[Array, " B"], Int[Array, " B"]],
    tuple[Int[Array, "B K C"], Int[Array, "B K"]],
]


@dataclass(frozen=True)
class Method:
    """An attention method.

    Attributes:
      name: as in `DecodeConfig.method`.
      select: which pages a sparse layer loads: (config, layer state with the newest keys written, newest
        queries[B, N, D], their positions[B], budgets in pages[B]) -> (page_ids[B, K, C], counts[B, K]),
        where a budget of 0 must give a count of 0. None: every layer is dense.
      default_window: W where the configuration gives none.
      revises: whether windows beyond 1, which revise past queries, make sense.
    """

    name: str
    select: Select | None
    default_window: int = 1
    revises: bool = False

    @property
    def dense(self) -> bool:
        """Whether every layer uses full attention."""
        return self.select is None
