"""Which layers of a model a decode step runs densely, and which sparsely.

What may change here: the rule, and what of a layer's kind cannot be decoded. Who needs to know which layers
are sparse asks here.
"""

import itertools
import math
from dataclasses import dataclass

from retro_jax.config import DecodeConfig
from retro_jax.models.config import ModelConfig


@dataclass(frozen=True)
class LayerPlan:
    """How a decode step runs each layer.

    Attributes:
      sparse: of each layer, whether it loads selected pages only; the others attend to all.
      anchors: of each layer, whether it selects pages; other sparse layers load those of the anchor below.
      windows: of each layer, how many queries it serves: `config.slots` where it revises past ones, or 1.
    """

    sparse: tuple[bool, ...]
    anchors: tuple[bool, ...]
    windows: tuple[int, ...]

    @property
    def num_sparse(self) -> int:
        """Layers that load selected pages only."""
        return sum(self.sparse)

    @property
    def num_dense(self) -> int:
        """Layers that attend to all pages."""
        return len(self.sparse) - self.num_sparse

    @property
    def first_sparse(self) -> int:
        """The lowest sparse layer; the number of layers where none is.

        Below it past tokens' hidden states never change, so those layers run for the newest token only.
        """
        return self.sparse.index(True) if self.num_sparse else len(self.sparse)


def layer_plan(model: ModelConfig, config: DecodeConfig) -> LayerPlan:
    """Plans a model's layers: the first `config.dense_layers` are dense, and all of them for a dense method.

    Of the sparse layers every `config.anchor_every`-th is an anchor, from the first on, and the lowest
    `config.revised_layers` of them, rounded up to whole layers, revise past queries.

    Raises:
      ValueError: a layer has a sliding window shorter than the model's positions, or a soft cap of its
        scores, which are not decoded.
    """
    for index, kind in enumerate(model.layers):
        if kind.soft_cap is not None:
            raise ValueError(
                f"layer {index} of {model.name} caps its attention scores at {kind.soft_cap}, with which it "
                "cannot be decoded; retro_jax.models.forward computes it, or use a model without a soft cap"
            )
        # Up to the window both attentions are the same.
        if kind.window is not None and kind.window < model.max_positions:
            raise ValueError(
                f"layer {index} of {model.name} has a sliding window of {kind.window} tokens, beyond which "
                f"it cannot be decoded; use max_positions of at most {kind.window}, not {model.max_positions}"
            )
    dense = model.num_layers if config.attention.dense else config.dense_layers
    sparse = tuple(index >= dense for index in range(model.num_layers))
    numbers = tuple(itertools.accumulate(sparse))  # of sparse layers up to each
    anchors = tuple(
        is_sparse and (number - 1) % config.anchor_every == 0
        for is_sparse, number in zip(sparse, numbers, strict=True)
    )
    revised = math.ceil(round(config.revised_layers * sum(sparse), 9))  # 0.55 * 20 is a little above 11
    windows = tuple(
        config.slots if is_sparse and number <= revised else 1
        for is_sparse, number in zip(sparse, numbers, strict=True)
    )
    return LayerPlan(sparse, anchors, windows)
