"""Llama 2, 3 and 3.1, SmolLM2 and DeepSeek-R1-Distill-Llama; in GGUF also Mistral and Mixtral."""

from retro_jax.models.config import ModelConfig, RopeScaling
from retro_jax.models.families.family import EXPERT_KEYS, Family, FileFormat, gguf_experts, gguf_kinds

_BFLOAT16 = {"dtype": "bfloat16"}
_LLAMA3 = _BFLOAT16 | {"rope_theta": 500_000.0}
_LLAMA3_1 = _LLAMA3 | {"rope_scaling": RopeScaling("llama3", factor=8.0, original_positions=8192)}
_SMOLLM2 = {"rope_theta": 100_000.0, "tie_embeddings": True}

LLAMA = Family(
    huggingface=FileFormat("llama"),
    gguf=FileFormat("llama", keys=EXPERT_KEYS, layer_kinds=gguf_kinds, fields=gguf_experts),
    gguf_interleaved=True,
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig("tiny", 512, 4, 8, 2, 16, 128, 256, 4096),
        ModelConfig("smollm2-135m", 49152, 30, 9, 3, 64, 576, 1536, 8192, **_SMOLLM2),
        ModelConfig("llama2-7b", 32000, 32, 32, 32, 128, 4096, 11008, 4096, **_BFLOAT16),
        ModelConfig("llama3-8b", 128256, 32, 32, 8, 128, 4096, 14336, 8192, **_LLAMA3),
        ModelConfig("llama3.1-8b", 128256, 32, 32, 8, 128, 4096, 14336, 131072, **_LLAMA3_1),
        ModelConfig("llama3.1-70b", 128256, 80, 64, 8, 128, 8192, 28672, 131072, **_LLAMA3_1),
        ModelConfig("deepseek-r1-distill-llama-8b", 128256, 32, 32, 8, 128, 4096, 14336, 131072, **_LLAMA3_1),
    ),
)
