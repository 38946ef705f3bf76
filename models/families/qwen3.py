"""Qwen3: queries and keys have norms."""

from retro_jax.models.config import ModelConfig
from retro_jax.models.families.family import Family, FileFormat
from retro_jax.models.families.qwen2 import QWEN2

_QWEN3 = {"rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True, "dtype": "bfloat16"}

QWEN3 = Family(
    huggingface=FileFormat("qwen3", defaults={**QWEN2.huggingface.defaults, "head_dim": 128}),
    gguf=FileFormat("qwen3"),
    parts={"qk_norm": True},
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig("qwen3-8b", 151936, 36, 32, 8, 128, 4096, 12288, 40960, **_QWEN3),
    ),
)
