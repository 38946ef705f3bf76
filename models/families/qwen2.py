"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: projections of queries, keys and values have biases."""

from retro_jax.models.config import ModelConfig
from retro_jax.models.families.family import Family, FileFormat

_QWEN2_5 = {"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "dtype": "bfloat16"}

QWEN2 = Family(
    huggingface=FileFormat(
        "qwen2",
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    gguf=FileFormat("qwen2"),
    parts={"qkv_bias": True},
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig("qwen2.5-7b", 152064, 28, 28, 4, 128, 3584, 18944, 32768, **_QWEN2_5),
        ModelConfig("qwen2.5-14b", 152064, 48, 40, 8, 128, 5120, 13824, 32768, **_QWEN2_5),
        ModelConfig("qwen2.5-32b", 152064, 64, 40, 8, 128, 5120, 27648, 32768, **_QWEN2_5),
    ),
)
