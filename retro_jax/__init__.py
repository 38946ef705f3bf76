"""RetroAttention for JAX: functional decoding with full, Quest and retrospective sparse attention.

The pure functions `prefill`, `extend`, `decode_step`, `decode` and `teacher_force` take all state as one
pytree; `generate` and `score` are the loops around them that most users want. Configuration, state, page
selection by method, sampling, sharding and metrics live here, one module each; operations on pages are
`pallas_kernels`', model families are `models`'. A method is one file in `methods/`.

Axes: B batch, T tokens, W window slots (oldest first, the newest is slot W-1), L layers, N query heads,
K KV heads, G = N/K, D head_dim, P pages, C selected pages, S page_size, M model width, V vocabulary.
"""

from models import Model, load_model
from retro_jax.config import DecodeConfig
from retro_jax.decode import Decoded, decode, teacher_force
from retro_jax.generate import Generation, NonFiniteLogits, generate
from retro_jax.metrics import Metrics
from retro_jax.prefill import extend, prefill
from retro_jax.presets import PRESETS, preset
from retro_jax.sampling import Sampling
from retro_jax.score import Score, score
from retro_jax.sharding import make_mesh, shard_params, shard_state
from retro_jax.state import DecodeState, init_state
from retro_jax.step import decode_step

__all__ = [
    "PRESETS",
    "DecodeConfig",
    "DecodeState",
    "Decoded",
    "Generation",
    "Metrics",
    "Model",
    "NonFiniteLogits",
    "Sampling",
    "Score",
    "decode",
    "decode_step",
    "extend",
    "generate",
    "init_state",
    "load_model",
    "make_mesh",
    "prefill",
    "preset",
    "score",
    "shard_params",
    "shard_state",
    "teacher_force",
]
