"""What loading gives: a configuration, its weights and, where the source has one, its tokenizer."""

from dataclasses import dataclass

import jax

from retro_jax.models.config import ModelConfig
from retro_jax.models.tokenizer import Tokenizer
from retro_jax.models.transformer import Params


@dataclass(frozen=True)
class Model:
    """A model ready to decode.

    Attributes:
        config: sizes and parts.
        params: weights in the configuration's dtype.
        tokenizer: None for random weights and for sources without one; prompts are then token ids.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        config, weights = self.config, jax.tree.leaves(self.params)
        count = sum(weight.size for weight in weights)
        size = sum(weight.size * weight.dtype.itemsize for weight in weights)
        devices = {str(device) for weight in weights[:1] for device in getattr(weight, "devices", list)()}
        return "\n".join(
            [
                f"Model {config.name}",
                f"  {config.num_layers} layers of width {config.width}, hidden width {config.hidden_width}",
                *self._experts(),
                f"  {config.num_heads} query heads and {config.num_kv_heads} KV heads of {config.head_dim}",
                f"  {config.max_positions} positions, vocabulary of {config.vocab_size}, "
                f"{'a' if self.tokenizer else 'no'} tokenizer",
                f"  {count / 1e6:.1f} million weights in {config.dtype}, {size / 1e9:.2f} GB on "
                f"{', '.join(sorted(devices)) or 'no device'}",
            ]
        )

    def _experts(self) -> list[str]:
        experts = self.config.experts
        if experts is None:
            return []
        return [
            f"  {experts.count} experts of hidden width {experts.hidden_width}, "
            f"{experts.per_token} for each token"
        ]
