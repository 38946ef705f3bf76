"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retro_jax.models.config import Rope, RopeScaling


def rope_frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Angles per position and what scales cosine and sine.

    Args:
        rope: of the layer.
        head_dim: D.
        max_positions: that the model is good for; longrope has other factors beyond its original ones.

    Returns:
        float32 (R/2,) radians per position for R rotated channels, and the attention factor (1.0 but for
        yarn, unless stated).
    """
    channels = rope.channels or head_dim
    frequencies = rope.theta ** -(np.arange(0, channels, 2) / channels)
    scaling = rope.scaling
    if scaling is None:
        return frequencies.astype(np.float32), 1.0
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "factors":
        frequencies = frequencies / np.asarray(scaling.factors)
    elif scaling.kind == "longrope":
        short = max_positions <= scaling.original_positions
        frequencies = frequencies / np.asarray(scaling.short_factors if short else scaling.factors)
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    else:
        frequencies = _yarn(frequencies, scaling, rope.theta)
    return frequencies.astype(np.float32), _attention_factor(scaling)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn" and scaling.factor > 1:
        return 0.1 * math.log(scaling.factor) + 1.0
    return 1.0


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: divides low frequencies, keeps high ones, and blends linearly in turns between."""
    turns = scaling.original_positions * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """YaRN's NTK-by-parts (arXiv 2309.00071, section 3.2): the ramp is linear in the channel index."""
    half = len(frequencies)

    def channel(turns: float) -> float:
        return half * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def apply_rope(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], rope: Rope, max_positions: int
) -> Float[Array, "B T H D"]:
    """Rotates each head's vector by its token's position; any positions, in float32, result in x's dtype.

    Args:
        x: vectors, of which the first `rope.channels` are rotated.
        positions: of the tokens.
        rope: of the layer.
        max_positions: that the model is good for.
    """
    cos, sin = rotation(positions, rope, x.shape[-1], max_positions)
    return rotate(x, cos[..., None, :], sin[..., None, :])


def rotation(
    positions: Int[Array, "B T"], rope: Rope, head_dim: int, max_positions: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of the angles by which pairs of channels are turned, times the attention factor.

    Args:
        positions: of the tokens.
        rope: of the layer.
        head_dim: D.
        max_positions: that the model is good for.
    """
    frequencies, attention_factor = rope_frequencies(rope, head_dim, max_positions)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(
    x: Float[Array, "*B D"], cos: Float[Array, "*#B half"], sin: Float[Array, "*#B half"]
) -> Float[Array, "*B D"]:
    """Turns pairs of channels by the angles of these cosines and sines, in float32, result in x's dtype.

    Channels past the first 2 * half stay as they are.
    """
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, kept], axis=-1) if kept.shape[-1] else rotated
