"""OLMo 2: norms stand after attention and mlp only, and those of queries and keys are over all heads."""

from retro_jax.models.config import ModelConfig
from retro_jax.models.families.family import NAMES, NORMS_AFTER, Family, FileFormat

_PARTS = {"norms": "after", "qk_norm": True, "joint_qk_norm": True}
_OLMO2 = _PARTS | {"rope_theta": 500_000.0, "norm_eps": 1e-6, "dtype": "bfloat16"}

OLMO2 = Family(
    huggingface=FileFormat(
        "olmo2", defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "num_key_value_heads": None}
    ),
    gguf=FileFormat("olmo2"),
    parts=_PARTS,
    names=NAMES | NORMS_AFTER,
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig("olmo2-1b", 100352, 16, 16, 16, 128, 2048, 8192, 4096, **_OLMO2),
        ModelConfig("olmo2-7b", 100352, 32, 32, 32, 128, 4096, 11008, 4096, **_OLMO2),
        ModelConfig("olmo2-13b", 100352, 40, 40, 40, 128, 5120, 13824, 4096, **_OLMO2),
        ModelConfig("olmo2-32b", 100352, 64, 40, 8, 128, 5120, 27648, 4096, **_OLMO2),
    ),
)
