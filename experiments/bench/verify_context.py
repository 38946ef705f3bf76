"""A context that several runs of verified decoding begin with, one after another.

Its pages are one buffer that goes from run to run: what lies beyond a sequence's length has no meaning, and
the arrays beside the pages are copied for each run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from retro_jax import DecodeConfig, DecodeState, Model, init_state
from retro_jax.budget import Budget
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.plan import layer_plan
from retro_jax.prompts import run_prefill
from retro_jax.state import LayerState


@partial(jax.jit, static_argnames="batch")
def _repeated(state, batch):
    return jax.tree.map(lambda array: jnp.repeat(array, batch, axis=0), state)


_copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def read_context(
    model: Model,
    config: DecodeConfig,
    ids: Int[np.ndarray, " T"],
    own: Int[np.ndarray, "B T"],
    capacity: int,
    progress: Callable[[str, int, int], None],
) -> tuple[DecodeState, Int[jax.Array, " B"]]:
    """The state behind a context, and the token that follows it.

    Args:
      model: the model.
      config: how to draft.
      ids: tokens that all sequences share; read once, and copied.
      own: tokens of each sequence behind them.
      capacity: tokens per sequence that the cache holds.
      progress: told about the prefill.
    """
    one, _ = run_prefill(model, config, init_state(model.config, config, 1, capacity), [ids], progress)
    state = _repeated(one, len(own))
    del one
    state, logits = run_prefill(model, config, state, list(own), progress)
    return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def unread_context(
    model: Model, config: DecodeConfig, tokens: int, batch: int, capacity: int
) -> tuple[DecodeState, Int[jax.Array, " B"]]:
    """The state as if so many tokens had been read; its pages hold zeros, which take no less to load."""
    state = init_state(model.config, config, batch, capacity)
    length = jnp.full_like(state.length, tokens)
    return state.replace(length=length), jnp.zeros_like(length)


class Context:
    """A state behind the context, from which several runs begin one after another.

    Args:
      model: the model.
      config: how to draft, with the largest budget.
      state: behind the context; taken over.
      tokens: what each sequence goes on with.
    """

    def __init__(self, model: Model, config: DecodeConfig, state: DecodeState, tokens: Int[jax.Array, " B"]):
        self.config, self.tokens = config, tokens
        self._model, self._capacity = model, state.capacity
        self._pages = [layer.pages for layer in state.layers]
        self._beside = state.replace(layers=()), [_beside_pages(layer) for layer in state.layers]

    def begin(self, budget: float) -> DecodeState:
        """The state with this budget; `end` takes its pages back."""
        state, layers = _copies(self._beside)
        config = replace(self.config, **budget_fields(budget))
        return state.replace(budget=Budget.of(config, len(self.tokens)), layers=self._layers(layers))

    def begin_full(self, config: DecodeConfig) -> DecodeState:
        """The state of full attention behind the same tokens; `end` takes its pages back.

        Raises:
          ValueError: it would keep other tokens of a sliding window.
        """
        rings = layer_plan(self._model.config, config).rings
        if rings != layer_plan(self._model.config, self.config).rings:
            raise ValueError(
                f"{self._model.config.name} has sliding windows, of which {self.config.slots} queries a step "
                "keep more tokens than full attention does; use a window of 1"
            )
        batch, capacity = len(self.tokens), self._capacity
        shapes = jax.eval_shape(partial(init_state, self._model.config, config, batch, capacity))
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.replace(layers=()))
        layers = self._layers([{}] * len(shapes.layers))
        return empty.replace(length=jnp.copy(self._beside[0].length), layers=layers)

    def _layers(self, beside: Sequence[dict[str, Any]]) -> tuple[LayerState, ...]:
        pages, self._pages = self._pages, None
        return tuple(LayerState(pages=own, **others) for own, others in zip(pages, beside, strict=True))

    def end(self, state: DecodeState) -> None:
        """Takes the pages of a state that nothing more will be done with."""
        self._pages = [layer.pages for layer in state.layers]


def _beside_pages(layer: LayerState) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in vars(layer) if name != "pages"}
