"""What is asked of a batch whose sequences come and go, and what it replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from retro_jax.cache import StepMetrics
from retro_jax.inputs import Prompt, check_whole, prompt_ids
from retro_jax.metrics import Metrics
from retro_jax.models import Model
from retro_jax.models.config import ModelConfig
from retro_jax.sampling import KEY_KIND
from retro_jax.texts import Texts


@dataclass(frozen=True)
class Request:
    """A prompt with what is asked for it alone.

    Attributes:
      prompt: a text, or token ids.
      max_new_tokens: None: that of the call.
      key: its random key, from `jax.random.key(seed, impl="threefry2x32")`; None: from `sampling.seed` and
        the prompt's place among all prompts, as in `generate`.
    """

    prompt: Prompt
    max_new_tokens: int | None = None
    key: Key[Array, ""] | None = None


@dataclass(frozen=True)
class Reply:
    """What `generate_many` made of one prompt.

    Attributes:
      index: the prompt's place among all prompts, from 0.
      prompt_tokens: how many the prompt has.
      text: the generated text, without the stop token or string; empty where the model has no tokenizer.
      tokens: the generated token ids, the stop token or those of the stop string included.
      logprobs: natural logarithm of each token's probability in the model's whole distribution where it was
        chosen, at temperature 1 whatever the sampling.
      finished: whether it ended by a stop token or string.
      metrics: of its decode steps, as of a batch of one; None if the prompt alone gave every token.
    """

    index: int
    prompt_tokens: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: bool
    metrics: Metrics | None


def check_request(
    model: Model, index: int, prompt: Prompt | Request, max_new_tokens: int, capacity: int | None
) -> "Pending":
    """A prompt, or a request, as a sequence that has not begun.

    Args:
      model: that will reply.
      index: of the prompt, which errors name.
      prompt: what came.
      max_new_tokens: where the request does not say.
      capacity: tokens that the cache holds; None: as many as the model has positions.

    Raises:
      ValueError: see `prompt_ids`; or prompt and new tokens do not fit, new tokens are below 1, or a key
        draws differently in batches of other sizes.
      TypeError: see `prompt_ids`; or new tokens are not a whole number, or a key is none.
    """
    request = prompt if isinstance(prompt, Request) else Request(prompt)
    ids = prompt_ids(model, request.prompt, index, True)
    new = max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    check_whole(**{f"prompt {index}: max_new_tokens": new})
    check_room(model.config, index, len(ids) + new, capacity)
    key = request.key
    if key is None:
        return Pending(index, ids, new)
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key) or key.shape:
        raise TypeError(f"the key of prompt {index} is not one typed key; make it by jax.random.key(seed)")
    if (kind := str(jax.random.key_impl(key))) != KEY_KIND:
        raise ValueError(
            f"the key of prompt {index} is of kind {kind}, which draws differently in batches of other "
            f"sizes; make it by jax.random.key(seed, impl={KEY_KIND!r})"
        )
    return Pending(index, ids, new, np.asarray(jax.random.key_data(key)))


def check_room(model: ModelConfig, index: int, needed: int, capacity: int | None) -> None:
    """Raises ValueError if a prompt and its reply need more positions than the model has, or the cache holds.

    Args:
      model: that will reply.
      index: of the prompt, which errors name.
      needed: positions of both.
      capacity: tokens that the cache holds; None: as many as the model has positions.
    """
    if needed > model.max_positions:
        raise ValueError(
            f"prompt {index} and its new tokens take {needed} positions, {model.name} has "
            f"{model.max_positions}; shorten the prompt or generate fewer tokens"
        )
    if capacity is not None and needed > capacity:
        raise ValueError(
            f"prompt {index} and its new tokens take {needed} positions, the cache holds {capacity}; raise "
            "the capacity, shorten the prompt or generate fewer tokens"
        )


class Pending:
    """A prompt on its way to a reply.

    Args:
      index: its place among all prompts.
      ids: its tokens.
      max_new_tokens: of the reply.
      key: the data of its random key; None: from the seed and its place.
    """

    def __init__(self, index: int, ids: np.ndarray, max_new_tokens: int, key: np.ndarray | None = None):
        self.index, self.ids, self.max_new_tokens, self.key = index, ids, max_new_tokens, key
        self.logprobs, self.metrics = [], []
        self.shared, self.ends_run = 0, False
        """First tokens that it shares with its run (`beginnings.runs`), and whether it is the last of it."""

    def begin(self, model: Model, stop_tokens: Sequence[int], stop: Sequence[str]) -> None:
        """Nothing has been generated yet; says what will end it."""
        self.texts = Texts(model.tokenizer, [()], stop_tokens, stop, None)

    def append(self, tokens: np.ndarray, logprobs: np.ndarray, metrics: StepMetrics | None = None) -> None:
        """Adds what one call generated, up to where a stop string is whole."""
        count, step = 0, 1 if self.texts.stop else max(len(tokens), 1)
        while count < len(tokens) and not self.texts.ended[0]:
            piece = tokens[None, count : count + step]
            self.texts.append(piece, np.ones(piece.shape, bool))
            count += step
        self.logprobs += logprobs[:count].tolist()
        if metrics is not None and count:
            self.metrics.append(jax.tree.map(lambda array: array[:count], metrics))

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be generated."""
        return self.texts.ended[0] or len(self.logprobs) >= self.max_new_tokens

    def reply(self) -> Reply:
        """What there is."""
        return Reply(
            index=self.index,
            prompt_tokens=len(self.ids),
            text=self.texts.text(0),
            tokens=self.texts.tokens(0),
            logprobs=self.logprobs,
            finished=self.texts.ended[0],
            metrics=Metrics.gather(self.metrics) if self.metrics else None,
        )
