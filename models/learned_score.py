"""Weights of a learned page score, which lie beside those of the layer that it chooses pages for."""

import dataclasses

import flax.struct
from jaxtyping import Array, Float

from retro_jax.models.joined import weight


@flax.struct.dataclass
class LearnedScore:
    """Of one layer: a map of its queries and one of its pages' keys to d channels (`retro_jax.learned`).

    Attributes:
      query: of each query head, from its query as it was before the rotary embedding.
      query_bias: added to that.
      key: from the mean, the highest and the lowest of a page's keys, channel by channel, as they were before
        the rotary embedding.
      key_bias: added to that.
      log_frequencies: log of the radians a position by which pairs of the d channels are rotated.
      page_size: tokens of the pages that it was trained for; static.
    """

    query: Float[Array, "N D d"] = weight(divided=0)
    query_bias: Float[Array, "N d"] = weight(divided=0)
    key: Float[Array, "K 3D d"] = weight(divided=0)
    key_bias: Float[Array, "K d"] = weight(divided=0)
    log_frequencies: Float[Array, "K d/2"] = weight(divided=0)
    page_size: int = flax.struct.field(pytree_node=False)

    @property
    def channels(self) -> int:
        """d, the channels of a page's summary."""
        return self.query.shape[-1]


SCORE_ARRAYS = tuple(field.name for field in dataclasses.fields(LearnedScore) if field.name != "page_size")
"""Fields of `LearnedScore` that are weights."""
