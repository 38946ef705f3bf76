"""Prompts into a state, from outside: one compiled call of `extend` for each chunk."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retro_jax.compilation import JitForMesh
from retro_jax.config import DecodeConfig
from retro_jax.models import Model
from retro_jax.prefill import extend
from retro_jax.sizes import MIN_CHUNK, program_length
from retro_jax.state import DecodeState

Progress = Callable[[str, int, int], None]
"""Called with the stage ("prefill" or "decode"), the tokens done and their total."""

_extend = JitForMesh(extend, static_argnames=("model", "config"), donate_argnames="state")


def run_prefill(
    model: Model,
    config: DecodeConfig,
    state: DecodeState,
    ids: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Append the ids by one compiled call per chunk; returns the state and the logits after them.

    Chunks are no longer than the longest prompt needs. Rows of the state after those of the ids get nothing;
    their logits are zeros.
    """
    rows = state.length.shape[0]
    lengths = np.zeros(rows, int)
    lengths[: len(ids)] = [len(row) for row in ids]
    total = int(lengths.max())
    chunk = program_length(total, MIN_CHUNK, config.prefill_chunk)
    padded = np.zeros((rows, -(-total // chunk) * chunk), np.int32)
    for row, values in zip(padded, ids, strict=False):
        row[: len(values)] = values
    logits: Float[Array, "B V"] = jnp.zeros((rows, model.config.vocab_size))
    for begin in range(0, total, chunk):
        counts: Int[np.ndarray, " B"] = np.clip(lengths - begin, 0, chunk).astype(np.int32)
        tokens = padded[:, begin : begin + chunk]
        state, fresh = _extend(model.params, model.config, config, state, tokens, counts)
        logits = jnp.where((counts > 0)[:, None], fresh, logits)
        if progress:
            progress("prefill", min(begin + chunk, total), total)
    return state, logits
