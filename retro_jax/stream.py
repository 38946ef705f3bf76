"""The residual stream of a pass over the layers, and its norm for what reads it next.

A layer adds twice to the stream, and each time it is normed: for the layer's own MLP, and for the attention
of the next one or the logits. Addition and norm are one operation (`pallas_kernels.add_parts`), which on
Hopper GPUs is one launch between two products. So a layer is given the norm of what comes behind it.
"""

from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import add_parts
from retro_jax.models import transformer
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params

Norm = Float[Array, " M"] | None
"""The weight of a norm; None where there is none."""


class Stream(NamedTuple):
    """The residual stream between two products.

    Attributes:
      x: the stream itself.
      h: what is read of it next: its norm, or x where that has none.
    """

    x: Float[Array, "B T M"]
    h: Float[Array, "B T M"]

    def last(self, tokens: int) -> "Stream":
        """That of the newest `tokens`."""
        return Stream(self.x[:, -tokens:], self.h[:, -tokens:])


def norms(params: Params) -> tuple[Norm, ...]:
    """The norms between layers: of each one's attention, and behind the last of them the final one."""
    return *(layer.attn_norm for layer in params.layers), params.final_norm


def begin(x: Float[Array, "B T M"], norm: Norm, model: ModelConfig) -> Stream:
    """The stream as it is, for what has that norm."""
    return Stream(x, transformer.normed(x, norm, model))


def read_whole(stream: Stream) -> Stream:
    """What the last layer leaves: of one whose x nothing reads, JAX would lower a function of its own."""
    return lax.optimization_barrier(stream)


def add(
    stream: Stream,
    parts: Float[Array, "S B rows M"],
    post_norm: Norm,
    norm: Norm,
    model: ModelConfig,
    implementation: str | None,
) -> Stream:
    """The stream with what attention or an MLP adds to it.

    Args:
      stream: before.
      parts: whose sum is added, see `pallas_kernels.add_parts`.
      post_norm: of their sum.
      norm: of what reads the stream next.
      model: sizes.
      implementation: of the addition.
    """
    options = {"eps": model.norm_eps, "multiplier": model.residual_multiplier}
    return Stream(*add_parts(stream.x, parts, post_norm, norm, **options, implementation=implementation))
