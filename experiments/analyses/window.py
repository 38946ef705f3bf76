"""The window of RetroAttention, read from decode states, and what full attention computes in its place.

Every step of its window revises a past query. `newly_attended` says which pages a step gave to each query,
`by_query` turns what was read after each step into what one query went through, and `full_attention` is what
outputs and keys are compared with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KEYS, Pages, dequantized
from retro_jax import DecodeConfig, DecodeState
from retro_jax.layers import window_slots
from retro_jax.models import ModelConfig, Params, transformer


class FullAttention(NamedTuple):
    """Full attention in every layer over a whole text.

    Attributes:
      o: attention outputs, before the output projection.
      k: keys, rotary embedding included, as the cache holds them.
      v: values.
    """

    o: Float[Array, "L B T N D"]
    k: Float[Array, "L B T K D"]
    v: Float[Array, "L B T K D"]


@functools.partial(jax.jit, static_argnames="model")
def full_attention(params: Params, model: ModelConfig, tokens: Int[Array, "B T"]) -> FullAttention:
    """Runs the model with dense causal attention; memory grows with the square of T.

    Args:
      params: weights.
      model: the model's configuration; static.
      tokens: the text.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = transformer.embed(params, tokens)
    outputs, keys, values = [], [], []
    for layer, kind in zip(params.layers, model.layers, strict=True):
        q, k, v = transformer.qkv(layer, model, kind, x, positions)
        outputs.append(transformer.causal_attention(q, k, v, kind.window))
        keys.append(k)
        values.append(v)
        x = transformer.mlp(layer, model, transformer.attention_output(layer, x, outputs[-1]))
    return FullAttention(jnp.stack(outputs), jnp.stack(keys), jnp.stack(values))


def newly_attended(
    config: DecodeConfig, before: DecodeState, after: DecodeState, layer: int
) -> Bool[Array, "B W K P"]:
    """Returns the pages that each query of the window attended to for the first time in one step.

    The newest query's are all pages that the step loaded; an older query's are those among them that it had
    missed so far. Nothing for slots whose tokens belong to the prompt.

    Args:
      config: how was decoded.
      before: the state that the step began with; not donated to it.
      after: the state that it returned, all sequences being active.
      layer: a sparse layer.

    Raises:
      ValueError: the layer has full attention.
    """
    past, now = before.layers[layer].last_loaded, after.layers[layer].last_loaded
    if past is None or now is None:
        raise ValueError(f"layer {layer} has full attention and selects no pages; choose a sparse layer")
    slot = window_slots(config, before, jnp.ones_like(before.length, bool)).positions[:, :, None, None]
    loaded = now == before.length[:, None, None]
    first_token = jnp.arange(now.shape[-1]) * config.page_size
    return loaded[:, None] & (past[:, None] < slot) & (first_token <= slot)


def window_keys(pages: Pages, positions: Int[Array, " W"]) -> Float[Array, "B W K D"]:
    """Returns the keys of the tokens at the given positions, as the cache holds them."""
    return cached(pages, positions, KEYS)


def cached(pages: Pages, positions: Int[Array, " A"], part: int) -> Float[Array, "B A K D"]:
    """Returns what the cache holds of the tokens at the given positions: `KEYS` or `VALUES`."""
    page, place = positions // pages.shape[-2], positions % pages.shape[-2]
    return dequantized(jax.tree.map(lambda array: array[:, :, page, part, place], pages)).swapaxes(1, 2)


def relative_distance(
    vectors: Float[Array, "*rows heads D"], expected: Float[Array, "*rows heads D"]
) -> Float[Array, "*rows"]:
    """Returns the length of the difference over the length of what was expected, all heads together."""
    length = functools.partial(jnp.linalg.norm, axis=(-2, -1))
    return length(vectors - expected) / length(expected)


def by_query(values: Float[np.ndarray, "steps slots *rest"]) -> Float[np.ndarray, "queries slots *rest"]:
    """Turns values of each step's slots, oldest first, into those of each query after 0, 1, ... later steps.

    The query of step n is the last slot then, and the one before it a step later. Left out are the last
    queries, which fewer steps followed.

    Raises:
      ValueError: there are fewer steps than slots.
    """
    steps, slots = values.shape[:2]
    if steps < slots:
        raise ValueError(f"{steps} steps follow no query through {slots} slots; take {slots} or more")
    queries = np.arange(steps - slots + 1)[:, None]
    later = np.arange(slots)
    return values[queries + later, slots - 1 - later]
