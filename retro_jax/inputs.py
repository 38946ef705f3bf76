"""What is checked at the doors: of `generate` and `score`, and of the pure functions under them.

Within a trace the shapes and types of arguments are known, their values are not: what can only be seen from
values is an error where they are known, and NaN in a sequence's logits where they are not.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from retro_jax.models import Model
from retro_jax.models.config import ModelConfig
from retro_jax.sizes import cache_capacity


class NonFiniteLogits(FloatingPointError):
    """A logit was NaN or infinite.

    Attributes:
      partial: what was done before, of the type that the call would have returned.
    """

    def __init__(self, message: str, partial: object):
        super().__init__(message)
        self.partial = partial


def check_whole(least: int = 1, **numbers: int | None) -> None:
    """Raises if a number is no whole one, or below `least`; None is left out.

    Raises:
      TypeError: it is not a whole number.
      ValueError: it is too small.
    """
    for name, number in numbers.items():
        if number is None:
            continue
        if not _is_whole(number):
            raise TypeError(f"{name} is {number!r}; give a whole number")
        if number < least:
            raise ValueError(f"{name} {number} must be at least {least}")


def _is_whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def check_ints(values: Array, shape: tuple[int, ...], what: str, wanted: str) -> Int[Array, "..."]:
    """`values` as int32.

    Raises:
      ValueError: they have another shape than `shape`, which `wanted` says in words.
      TypeError: they are not whole numbers.
    """
    _check_shape(values, shape, what, wanted)
    if not jnp.issubdtype(jnp.result_type(values), jnp.integer):
        raise TypeError(f"{what} has dtype {jnp.result_type(values)}; give whole numbers")
    return jnp.asarray(values, jnp.int32)


def check_ids(ids: Int[Array, "..."], given: Bool[Array, "..."], model: ModelConfig) -> None:
    """Raises ValueError if any of the token ids that are given is outside the vocabulary, if known."""
    if (known := _known(ids)) is None or (which := _known(given)) is None:
        return
    outside = which & ((known < 0) | (known >= model.vocab_size))
    for at in np.argwhere(outside):
        place, most = ", ".join(map(str, at)), model.vocab_size - 1
        raise ValueError(f"tokens[{place}] is {known[tuple(at)]}, not within 0..{most}, the vocabulary")


def check_bools(values: Array, shape: tuple[int, ...], what: str, wanted: str) -> Bool[Array, "..."]:
    """`values` as an array.

    Raises:
      ValueError: they have another shape than `shape`, which `wanted` says in words.
      TypeError: they are not truth values.
    """
    _check_shape(values, shape, what, wanted)
    if not jnp.issubdtype(jnp.result_type(values), jnp.bool_):
        raise TypeError(f"{what} has dtype {jnp.result_type(values)}; give truth values (bool)")
    return jnp.asarray(values)


def check_keys(keys: Key[Array, "..."], batch: int) -> Key[Array, " B"]:
    """The keys of a batch.

    Raises:
      ValueError: they are not one for each sequence.
      TypeError: they are not typed keys.
    """
    if not jnp.issubdtype(getattr(keys, "dtype", None), jax.dtypes.prng_key):
        raise TypeError("keys are not typed; make them by jax.random.split(jax.random.key(seed), B)")
    _check_shape(keys, (batch,), "keys", "one for each sequence")
    return keys


def _check_shape(values: Array, shape: tuple[int, ...], what: str, wanted: str) -> None:
    if jnp.shape(values) != shape:
        raise ValueError(f"{what} has shape {jnp.shape(values)}, not {shape}: {wanted}")


def check_lengths(lengths: Int[Array, " B"], least: int, tokens: int, room: Int[Array, " B"]) -> None:
    """Raises ValueError if any of the lengths is not within `least`..`tokens` or above the room, if known."""
    if (given := _known(lengths)) is None:
        return
    for sequence in np.flatnonzero((given < least) | (given > tokens)):
        raise ValueError(
            f"lengths[{sequence}] is {given[sequence]}, not within {least}..{tokens}, the tokens given for it"
        )
    if (known := _known(room)) is None:
        return
    for sequence in np.flatnonzero(given > known):
        raise ValueError(
            f"sequence {sequence} has room for {known[sequence]} more tokens, {given[sequence]} were given; "
            "begin with a larger capacity"
        )


def check_counts(counts: Int[Array, " B"], least: int, most: int, what: str) -> None:
    """Raises ValueError if any of the counts is not within `least`..`most`, if known."""
    if (given := _known(counts)) is None:
        return
    for sequence in np.flatnonzero((given < least) | (given > most)):
        raise ValueError(f"{what}[{sequence}] is {given[sequence]}, not within {least}..{most}")


def _known(values: Array) -> np.ndarray | None:
    """The values; None within a trace, or where other processes hold some of them."""
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return None
    return np.asarray(values)


def check_token_ids(model: ModelConfig, ids: Sequence | np.ndarray, what: str) -> np.ndarray:
    """`ids`, or equal rows of them, as int32.

    Raises:
      TypeError: they are not whole numbers.
      ValueError: there are none, or they have no shape, or one lies outside the vocabulary.
    """
    given = ids
    try:
        ids = np.asarray(given)
    except ValueError:
        raise ValueError(f"{what} holds rows of different lengths; give token ids along one axis") from None
    if ids.size == 0:
        raise ValueError(f"{what} is empty; give at least one token")
    if not np.issubdtype(ids.dtype, np.integer):
        numbers = np.asarray(given, object)
        if all(map(_is_whole, numbers.flat)):
            ids = numbers  # of which NumPy's integers do not hold all
    if ids.dtype != object and not np.issubdtype(ids.dtype, np.integer):
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
      ValueError: it is empty, a text without a tokenizer, not one row of token ids, or has one out of range.
    """
    what = f"prompt {index}"
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(f"{model.config.name} has no tokenizer; give {what} as token ids")
        if not prompt:
            raise ValueError(f"{what} is empty; give at least one character")
        prompt = model.tokenizer.encode(prompt, add_bos=None if first else False)
    ids = check_token_ids(model.config, prompt, what)
    if ids.ndim != 1:
        raise ValueError(f"{what} has shape {ids.shape}; give a text, or token ids along one axis")
    return ids


def check_capacity(model: ModelConfig, needed: int, capacity: int | None) -> int:
    """Tokens that the cache must hold: `capacity` if given, else `needed`, rounded up to a size of `sizes`.

    Raises:
      ValueError: more are needed than the capacity or the model's positions.
      TypeError: the capacity is not a whole number.
    """
    check_whole(capacity=capacity)
    if needed > model.max_positions:
        raise ValueError(
            f"prompt and new tokens take {needed} positions, {model.name} has {model.max_positions}; "
            "shorten the prompt or generate fewer tokens"
        )
    if capacity is None:
        return cache_capacity(needed, model.max_positions)
    if needed > capacity:
        raise ValueError(
            f"prompt and new tokens take {needed} positions, the cache holds {capacity}; pass a larger "
            "capacity on the first turn or to `load_state`, or generate fewer tokens"
        )
    return capacity


def check_stop_tokens(model: Model, stop_tokens: Sequence[int] | None) -> list[int]:
    """The given stop tokens, or the tokenizer's.

    Raises:
      ValueError: one lies outside the vocabulary.
      TypeError: one is not a whole number.
    """
    if stop_tokens is None:
        return list(model.tokenizer.stop_ids) if model.tokenizer else []
    for token in stop_tokens:
        if not _is_whole(token):
            raise TypeError(f"stop token {token!r} is not a whole number; give token ids")
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"stop token {token} lies outside the vocabulary (0..{model.config.vocab_size - 1})"
            )
    return list(stop_tokens)


def check_stop(model: Model, stop: Sequence[str]) -> None:
    """Raises TypeError or ValueError if these cannot be looked for in texts."""
    if isinstance(stop, str):
        raise TypeError("stop must be a list of strings; put a single one in brackets")
    if not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop has {list(stop)}; give strings of at least one character")
    if stop and model.tokenizer is None:
        raise ValueError(f"{model.config.name} has no tokenizer to look for stop strings; give stop_tokens")
