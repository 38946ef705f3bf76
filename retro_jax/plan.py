"""Which layers of a model a decode step runs densely, and which sparsely.

Only layers with full attention are ever sparse. A layer with a sliding window attends to all of its window.

What may change here: the rule. Who needs to know which layers are sparse, or what a layer's cache holds, asks
here.
"""

import itertools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

from retro_jax.config import DecodeConfig
from retro_jax.models.config import ModelConfig


@dataclass(frozen=True)
class LayerPlan:
    """How a decode step runs each layer.

    Attributes:
      sparse: of each layer, whether it loads selected pages only; the others attend to all that they hold.
      anchors: of each layer, whether it selects pages; other sparse layers load those of the anchor below.
      windows: of each layer, how many queries it serves: `config.slots` where it revises past ones, or 1.
      rings: of each layer with a sliding window, the latest tokens that its cache holds, as a ring; None for
        a layer with full attention, whose cache holds all.
    """

    sparse: tuple[bool, ...]
    anchors: tuple[bool, ...]
    windows: tuple[int, ...]
    rings: tuple[int | None, ...]

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that load selected pages only."""
        return tuple(itertools.compress(itertools.count(), self.sparse))

    @property
    def num_sparse(self) -> int:
        """Layers that load selected pages only."""
        return sum(self.sparse)

    @property
    def num_dense(self) -> int:
        """Layers with full attention that attend to all pages."""
        return self.rings.count(None) - self.num_sparse

    @property
    def first_sparse(self) -> int:
        """The lowest sparse layer; the number of layers where none is.

        Below it past tokens' hidden states never change, so those layers run for the newest token only.
        """
        return self.sparse.index(True) if self.num_sparse else len(self.sparse)

    def in_rings(self, context: Int[Array, " B"]) -> Int[Array, " B"]:
        """Tokens of a context that the layers with a sliding window hold, summed over these layers."""
        held = (jnp.minimum(context, ring) for ring in self.rings if ring is not None)
        return sum(held, jnp.zeros_like(context))


def layer_plan(model: ModelConfig, config: DecodeConfig) -> LayerPlan:
    """Plans a model's layers: the first `config.dense_layers` are dense, and all of them for a dense method.

    Only layers with full attention count, among them such whose window has all of the model's positions. Of
    the sparse layers every `config.anchor_every`-th is an anchor, from the first on, and the lowest
    `config.revised_layers` of them, rounded up to whole layers, revise past queries; a layer with a sliding
    window serves as many as the sparse layer below it, and past ones attend to their own windows.

    Raises:
      ValueError: a layer has a soft cap of its scores, which is not decoded.
    """
    for index, kind in enumerate(model.layers):
        if kind.soft_cap is not None:
            raise ValueError(
                f"layer {index} of {model.name} caps its attention scores at {kind.soft_cap}, with which it "
                "cannot be decoded; retro_jax.models.forward computes it, or use a model without a soft cap"
            )
    slides = [kind.window is not None and kind.window < model.max_positions for kind in model.layers]
    dense = model.num_layers if config.attention.dense else config.dense_layers
    full = itertools.accumulate(not each for each in slides)  # of layers with full attention up to each
    sparse = tuple(number > dense and not each for number, each in zip(full, slides, strict=True))
    numbers = tuple(itertools.accumulate(sparse))  # of sparse layers up to each
    anchors = tuple(
        is_sparse and (number - 1) % config.anchor_every == 0
        for is_sparse, number in zip(sparse, numbers, strict=True)
    )
    revised = math.ceil(round(config.revised_layers * sum(sparse), 9))  # 0.55 * 20 is a little above 11
    windows = tuple(config.slots if 0 < number <= revised else 1 for number in numbers)
    # The oldest query that a layer serves, or token that is passed over again, has its window in the ring.
    behind = (max(window, config.rectify_every or 1) - 1 for window in windows)
    rings = tuple(
        kind.window + more if each else None
        for kind, each, more in zip(model.layers, slides, behind, strict=True)
    )
    return LayerPlan(sparse, anchors, windows, rings)
