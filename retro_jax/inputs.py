"""What is checked at the door of `generate` and `score`."""

from collections.abc import Sequence

import numpy as np

from models import Model
from models.config import ModelConfig
from retro_jax.sizes import cache_capacity


class NonFiniteLogits(FloatingPointError):
    """A logit was NaN or infinite.

    Attributes:
      partial: what was done before, of the type that the call would have returned.
    """

    def __init__(self, message: str, partial: object):
        super().__init__(message)
        self.partial = partial


def check_token_ids(model: ModelConfig, ids: np.ndarray, what: str) -> np.ndarray:
    """`ids` as int32.

    Raises:
      TypeError: they are not whole numbers.
      ValueError: there are none, or one lies outside the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.size == 0:
        raise ValueError(f"{what} is empty; give at least one token")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{what} has dtype {ids.dtype}; token ids are whole numbers")
    bad = ids[(ids < 0) | (ids >= model.vocab_size)]
    if bad.size:
        raise ValueError(
            f"{what} has token id {bad[0]}, outside the vocabulary of {model.name} "
            f"(0..{model.vocab_size - 1})"
        )
    return ids.astype(np.int32)


Prompt = str | Sequence[int] | np.ndarray
"""A text, or token ids."""


def prompt_ids(model: Model, prompt: Prompt, index: int, first: bool) -> np.ndarray:
    """Token ids of one prompt; only the `first` text of a sequence begins as the model's texts begin.

    Raises:
      TypeError: the prompt is neither a text nor token ids.
      ValueError: it is empty, a text without a tokenizer, or has token ids out of range.
    """
    what = f"prompt {index}"
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(f"{model.config.name} has no tokenizer; give {what} as token ids")
        if not prompt:
            raise ValueError(f"{what} is empty; give at least one character")
        prompt = model.tokenizer.encode(prompt, add_bos=None if first else False)
    return check_token_ids(model.config, np.asarray(prompt), what)


def check_capacity(model: ModelConfig, needed: int, capacity: int | None) -> int:
    """Tokens that the cache must hold: `capacity` if given, else `needed`, rounded up to a size of `sizes`.

    Raises:
      ValueError: more are needed than the capacity or the model's positions.
    """
    if needed > model.max_positions:
        raise ValueError(
            f"prompt and new tokens take {needed} positions, {model.name} has {model.max_positions}; "
            "shorten the prompt or generate fewer tokens"
        )
    if capacity is None:
        return cache_capacity(model, needed)
    if needed > capacity:
        raise ValueError(
            f"prompt and new tokens take {needed} positions, the cache holds {capacity}; pass a larger "
            "capacity on the first turn, or generate fewer tokens"
        )
    return capacity
