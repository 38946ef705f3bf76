"""What a method decides, and what it says about itself."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Bool, Int

from retro_jax.cache import LayerState
from retro_jax.fields import DecodeFields
from retro_jax.methods.eviction import Eviction
from retro_jax.rules import Query, Rules

Select = Callable[
    [Rules, LayerState, Query, Bool[Array, "B K P"] | None], tuple[Int[Array, "B K C"], Int[Array, "B K"]]
]


@dataclass(frozen=True)
class Method:
    """An attention method. One that neither selects nor evicts has full attention in every layer.

    Attributes:
      name: as in `DecodeConfig.method`.
      title: as in tables.
      help: what it attends to, in a few words.
      select: which pages a sparse layer loads: (rules, layer state with the newest keys written, newest
        query, pages that eviction has left[B, K, P] or None where all are there) -> (page_ids[B, K, C],
        counts[B, K]), where a budget of 0 must give a count of 0; `Rules.choose` makes them of scores. None:
        all that eviction leaves.
      scored: whether it selects by `DecodeConfig.score`, among the pages that `DecodeConfig.evict` leaves.
      eviction: the rule by which pages leave the cache for good. None: none does.
      default_window: W where the configuration gives none.
      revises: whether windows beyond 1, which revise past queries, make sense.
      check: raises ValueError for fields of `DecodeConfig` that this method cannot do; those that any method
        refuses were refused before.

    Raises:
      ValueError: the name is no identifier, or two attributes contradict each other.
    """

    name: str
    title: str
    help: str
    select: Select | None = None
    scored: bool = False
    eviction: Eviction | None = None
    default_window: int = 1
    revises: bool = False
    check: Callable[[DecodeFields], None] = lambda fields: None

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"method name {self.name!r} is not a word of letters, digits and underscores")
        if self.select is None and (self.scored or self.revises):
            raise ValueError(f"method {self.name!r} selects no pages; leave scored and revises false")
        if self.default_window < 1 or (self.default_window > 1 and not self.revises):
            raise ValueError(
                f"default_window {self.default_window} of method {self.name!r} is not possible; use 1, or "
                "more with revises=True"
            )

    @property
    def dense(self) -> bool:
        """Whether every layer uses full attention."""
        return self.select is None and self.eviction is None
