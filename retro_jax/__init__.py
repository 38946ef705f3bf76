"""RetroAttention for JAX: functional decoding with full, Quest and retrospective sparse attention.

The pure functions `prefill`, `extend`, `decode_step`, `decode`, `verified_step`, `verified_decode` and
`teacher_force` take all state as one pytree; `generate`, `generate_many` and `score` are the loops around
them that most users want. Configuration, state, page selection by method, sampling, sharding and metrics live
here, one module each; operations on pages are `pallas_kernels`', model families are `models`'. A method is
one file in `methods/`.

What is named here is imported on first use, so that importing the package starts no JAX.

Axes: B batch, T tokens, W window slots (oldest first, the newest is slot W-1), L layers, N query heads, K KV
heads, G = N/K, D head_dim, P pages, C selected pages, S page_size, M model width, V vocabulary.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # for type checkers, as in `typing`, whose import would take longer than all of this

if TYPE_CHECKING:
    from pallas_kernels import register_score, register_statistic
    from retro_jax.batching import generate_many
    from retro_jax.compilation import compiler_options
    from retro_jax.config import DecodeConfig, preset
    from retro_jax.decode import Decoded, decode, teacher_force
    from retro_jax.drafts import Acceptance, VerifiedMetrics
    from retro_jax.generate import Generation, NonFiniteLogits, generate
    from retro_jax.methods import Eviction, Method, register_method
    from retro_jax.metrics import Metrics
    from retro_jax.models import Model, load_model, save_model
    from retro_jax.prefill import extend, prefill
    from retro_jax.presets import PRESETS
    from retro_jax.requests import Reply, Request
    from retro_jax.sampling import Sampling
    from retro_jax.saved_states import load_state, save_state
    from retro_jax.score import Score, score
    from retro_jax.score_files import load_score
    from retro_jax.sharding import make_mesh, params_on, shard_params, shard_state
    from retro_jax.state import DecodeState, init_state
    from retro_jax.step import decode_step
    from retro_jax.verify import VerifiedDecoded, VerifiedTokens, verified_decode, verified_step

__all__ = [
    "PRESETS",
    "Acceptance",
    "DecodeConfig",
    "DecodeState",
    "Decoded",
    "Eviction",
    "Generation",
    "Method",
    "Metrics",
    "Model",
    "NonFiniteLogits",
    "Reply",
    "Request",
    "Sampling",
    "Score",
    "VerifiedDecoded",
    "VerifiedMetrics",
    "VerifiedTokens",
    "compiler_options",
    "decode",
    "decode_step",
    "extend",
    "generate",
    "generate_many",
    "init_state",
    "load_model",
    "load_score",
    "load_state",
    "make_mesh",
    "params_on",
    "prefill",
    "preset",
    "register_method",
    "register_score",
    "register_statistic",
    "save_model",
    "save_state",
    "score",
    "shard_params",
    "shard_state",
    "teacher_force",
    "verified_decode",
    "verified_step",
]

_NAMES = {
    "pallas_kernels": ("register_score", "register_statistic"),
    "retro_jax.models": ("Model", "load_model", "save_model"),
    "retro_jax.batching": ("generate_many",),
    "retro_jax.compilation": ("compiler_options",),
    "retro_jax.config": ("DecodeConfig", "preset"),
    "retro_jax.decode": ("Decoded", "decode", "teacher_force"),
    "retro_jax.drafts": ("Acceptance", "VerifiedMetrics"),
    "retro_jax.generate": ("Generation", "NonFiniteLogits", "generate"),
    "retro_jax.methods": ("Eviction", "Method", "register_method"),
    "retro_jax.metrics": ("Metrics",),
    "retro_jax.prefill": ("extend", "prefill"),
    "retro_jax.presets": ("PRESETS",),
    "retro_jax.requests": ("Reply", "Request"),
    "retro_jax.sampling": ("Sampling",),
    "retro_jax.saved_states": ("load_state", "save_state"),
    "retro_jax.score": ("Score", "score"),
    "retro_jax.score_files": ("load_score",),
    "retro_jax.sharding": ("make_mesh", "params_on", "shard_params", "shard_state"),
    "retro_jax.state": ("DecodeState", "init_state"),
    "retro_jax.step": ("decode_step",),
    "retro_jax.verify": ("VerifiedDecoded", "VerifiedTokens", "verified_decode", "verified_step"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    """Importing a submodule binds its name in the package; a function of the same name must stay in view."""

    def __setattr__(self, name, value):
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata  # reads zip files and mail: five times what the rest of this takes

        value = metadata.version("retro-jax")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
