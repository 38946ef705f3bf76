"""Model families as configurations of one transformer; weights from Hugging Face, GGUF or a seed.

What may change here: how a model is described, computed layer by layer, and read from files, with its
tokenizer. How it decodes is `retro_jax`'s matter; this package imports nothing of ours.
"""

from models.config import ModelConfig, RopeScaling
from models.load import load_model
from models.model import Model
from models.tokenizer import Tokenizer
from models.transformer import (
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
    "LayerParams",
    "Model",
    "ModelConfig",
    "Params",
    "RopeScaling",
    "Tokenizer",
    "attention_output",
    "embed",
    "forward",
    "load_model",
    "logits",
    "mlp",
    "qkv",
    "random_params",
]
