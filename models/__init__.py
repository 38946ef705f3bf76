"""Model families as configurations of one transformer; weights from Hugging Face, GGUF, orbax or a seed.

What may change here: how a model is described, computed layer by layer, and read from files, with its
tokenizer. How it decodes is `retro_jax`'s matter; this package imports nothing of ours. Its rooms, each of
which imports those before it only: `config` (sizes, layer kinds), `config_json`, `fingerprint`, `rope`,
`joined`, `learned_score`, `transformer`, `balance`, `families`, `formats`, `presets` and `load`.

Its folder stands beside `retro_jax`, and its name within: `models` is a name that users' projects have.
"""

if __name__ != "retro_jax.models":
    raise ImportError(f"this package is imported as retro_jax.models, not as {__name__}")

from retro_jax.models.balance import balance_keys
from retro_jax.models.config import Experts, LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.formats.converted import save_model
from retro_jax.models.learned_score import LearnedScore
from retro_jax.models.load import load_model
from retro_jax.models.model import Model
from retro_jax.models.tokenizer import Tokenizer
from retro_jax.models.transformer import (
    LayerParams,
    Params,
    attention_output,
    embed,
    forward,
    logits,
    mlp,
    qkv,
    random_params,
)

__all__ = [
    "Experts",
    "LayerKind",
    "LayerParams",
    "LearnedScore",
    "Model",
    "ModelConfig",
    "Params",
    "Rope",
    "RopeScaling",
    "Tokenizer",
    "attention_output",
    "balance_keys",
    "embed",
    "forward",
    "load_model",
    "logits",
    "mlp",
    "qkv",
    "random_params",
    "save_model",
]
