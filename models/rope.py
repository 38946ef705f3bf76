"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retro_jax.models.config import Rope, RopeScaling


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position and what scales cosine and sine.

    Args:
        rope: of the layer.
        head_dim: D.

    Returns:
        float32 (D/2,) radians per position, and the attention factor (1.0 but for yarn, unless stated).
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    frequencies = rope.theta**-exponents
    scaling = rope.scaling
    attention_factor = 1.0
    if scaling is not None:
        attention_factor = scaling.attention_factor
        if scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "factors":
            frequencies = frequencies / np.asarray(scaling.factors)
        elif scaling.kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        else:
            frequencies = _yarn(frequencies, scaling, rope.theta)
        if attention_factor is None:
            grows = scaling.kind == "yarn" and scaling.factor > 1
            attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if grows else 1.0
    return frequencies.astype(np.float32), attention_factor


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
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], rope: Rope
) -> Float[Array, "B T H D"]:
    """Rotates each head's vector by its token's position; any positions, in float32, result in x's dtype."""
    frequencies, attention_factor = rope_frequencies(rope, x.shape[-1])
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
