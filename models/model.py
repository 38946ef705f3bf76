"""What loading gives: a configuration, its weights and, where the source has one, its tokenizer."""

from dataclasses import dataclass

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Params


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
