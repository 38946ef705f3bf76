"""The arrays that decoding carries, each with how it is spread over the devices of a mesh.

A field says so by `spread`, for all arrays in it; a field without it holds further such classes. An array for
which no field says it cannot be placed on a mesh: `sharding.state_shardings` refuses it.
"""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Pages, Statistics
from pallas_kernels.dispatch import HEADS, SEQUENCES


def spread(*axes: str | None, **options: Any) -> Any:
    """A field of a `flax.struct.dataclass` whose arrays are spread over the axes of a mesh.

    Args:
      *axes: the mesh axis that the devices share each of an array's first axes along; None for an axis that
        is whole on every device, as are those that are not given.
      **options: of `dataclasses.field`.
    """
    return flax.struct.field(metadata={"spread": axes}, **options)


@flax.struct.dataclass
class OutputCache:
    """Attention outputs of the last W-1 decoded tokens in one sparse layer, oldest first.

    Attributes:
      o: outputs over all pages that the query has attended to so far, float32.
      lse: their log-sum-exp.
    """

    o: Float[Array, "B older N D"] = spread(SEQUENCES, None, HEADS)
    lse: Float[Array, "B older N"] = spread(SEQUENCES, None, HEADS)


@flax.struct.dataclass
class Moments:
    """Of the queries of a prompt, without their rotary embedding.

    Attributes:
      count: how many there were.
      mean: of each head.
      scatter: sum of the outer products of what each differs by from the mean.
    """

    count: Int[Array, " B"] = spread(SEQUENCES)
    mean: Float[Array, "B N D"] = spread(SEQUENCES, HEADS)
    scatter: Float[Array, "B N D D"] = spread(SEQUENCES, HEADS)


@flax.struct.dataclass
class Prompt:
    """What is kept of a prompt until its end is known.

    Attributes:
      fresh: whether no token has been decoded since the prompt.
      queries: the last queries of the prompt, oldest first; None where the rule asks for none.
      at: their positions, -1 for none.
      moments: of all its queries; None where the rule does not ask.
    """

    fresh: Bool[Array, " B"] = spread(SEQUENCES)
    queries: Float[Array, "B observed N D"] | None = spread(SEQUENCES, None, HEADS, default=None)
    at: Int[Array, "B observed"] | None = spread(SEQUENCES, default=None)
    moments: Moments | None = None


@flax.struct.dataclass
class Kept:
    """What an eviction rule carries in one sparse layer.

    Attributes:
      alive: pages that were not evicted; those that have not begun are.
      mass: what attention each page got, as the rule counts it; None where it does not ask.
      prompt: for rules that evict at the end of a prompt only.
    """

    alive: Bool[Array, "B K P"] = spread(SEQUENCES, HEADS)
    mass: Float[Array, "B K P"] | None = spread(SEQUENCES, HEADS, default=None)
    prompt: Prompt | None = None


@flax.struct.dataclass
class LayerState:
    """The cache of one layer; only `pages` in a dense layer and in one with a sliding window.

    Attributes:
      pages: keys (0) and values (1) by page; what lies beyond a sequence's length has no meaning. With a
        sliding window a ring of the latest tokens (`LayerPlan.rings`, `pallas_kernels.sliding`).
      statistics: per page, of the kind that the configuration names; None if its score reads none, and in a
        layer that takes over the pages of its anchor.
      block_values: mean value of each block of pages; None for a configuration without a residual.
      last_loaded: the position whose step loaded the page last, -1 if none did.
      outputs: the output cache.
      kept: what eviction carries; None for a configuration that evicts nothing.
    """

    pages: Pages = spread(SEQUENCES, HEADS)
    statistics: Statistics | None = spread(SEQUENCES, HEADS, default=None)
    block_values: Float[Array, "B K blocks D"] | None = spread(SEQUENCES, HEADS, default=None)
    last_loaded: Int[Array, "B K P"] | None = spread(SEQUENCES, HEADS, default=None)
    outputs: OutputCache | None = None
    kept: Kept | None = None


@flax.struct.dataclass
class Stale:
    """Tokens decoded since their sequence was last rectified.

    Attributes:
      tokens: their ids, oldest first, in the first `count` places.
      count: how many there are.
    """

    tokens: Int[Array, "B f"] = spread(SEQUENCES)
    count: Int[Array, " B"] = spread(SEQUENCES)


@flax.struct.dataclass
class StepMetrics:
    """What the latest decode step did, per sequence; zeros for a sequence that was not active.

    Attributes:
      pages_attended: pages that the query of age a (0 is the newest) newly attended to, the mean over
        sparse layers and KV heads.
      pages_loaded: pages loaded, likewise.
      kv_bytes: bytes of keys, values and page statistics read, summed over all layers and KV heads; what a
        rectification reads is counted in the step that it follows.
      expert_bytes: bytes of the weights of experts that the step read for all sequences, shared equally by
        them; None in a model without experts.
    """

    pages_attended: Float[Array, "B W"] = spread(SEQUENCES)
    pages_loaded: Float[Array, " B"] = spread(SEQUENCES)
    kv_bytes: Float[Array, " B"] = spread(SEQUENCES)
    expert_bytes: Float[Array, " B"] | None = spread(SEQUENCES, default=None)
