"""What a method is told: the few values of a configuration that decide about pages, and the newest query."""

from dataclasses import dataclass

import flax.struct
from jaxtyping import Array, Float, Int

from pallas_kernels import choose_pages
from retro_jax.models.config import Rope


@flax.struct.dataclass
class Query:
    """The newest query of one sparse layer.

    Attributes:
      q: of every head, rotary embedding applied.
      scored: what page statistics are scored by: q, or its learned map to d channels.
      positions: its position, -1 in a sequence that is not active.
      budgets: pages that it may load; 0 in a sequence that is not active.
      layer: which layer of the model it is.
      sinks: the layer's sinks; None where it has none.
    """

    q: Float[Array, "B N D"]
    positions: Int[Array, " B"]
    budgets: Int[Array, " B"]
    layer: Int[Array, ""] | int
    scored: Float[Array, "B N _"]
    sinks: Float[Array, " N"] | None = None


@dataclass(frozen=True)
class Rules:
    """How pages are chosen in a layer whose cache has a given size. Static.

    Attributes:
      page_size: tokens of a page.
      sink_pages: pages at the beginning that are always loaded, and never evicted.
      places: C, room for the pages that a step loads.
      left_places: room for the pages that eviction leaves.
      left_pages: pages that eviction leaves; None: as many as the step may load.
      score: what pages are selected by: a name in `SELECTORS`.
      score_seed: of a random score.
      group_reduce: how the query heads of a KV head become one.
      observation: last queries of a prompt that a rule may ask.
      implementation: of the operations on pages.
      rope: how the layer turns queries and keys; None where it does not.
      max_positions: of the model.
    """

    page_size: int
    sink_pages: int
    places: int
    left_places: int
    left_pages: int | None
    score: str
    score_seed: int
    group_reduce: str
    observation: int
    implementation: str | None
    rope: Rope | None = None
    max_positions: int = 0

    def choose(
        self,
        scores: Float[Array, "B K P"],
        query: Query,
        limits: Int[Array, " B"] | None = None,
        places: int | None = None,
    ) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
        """The pages with the highest scores; sink pages and the newest page are always among them.

        Args:
          scores: of each page; -inf for one that must not be chosen.
          query: the newest.
          limits: how many pages; None: the query's budgets.
          places: room for them; None: that of a step's pages.

        Returns:
          Page ids, and how many of them count.
        """
        return choose_pages(
            scores,
            query.positions,
            query.budgets if limits is None else limits,
            page_size=self.page_size,
            capacity=self.places if places is None else places,
            sink_pages=self.sink_pages,
            implementation=self.implementation,
        )
