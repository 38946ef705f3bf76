"""Phi-3, Phi-4 and Phi-4-mini: matrices lie in one in their files, too; some rotate a part of each head."""

import math

from retro_jax.models.config import LayerKind, ModelConfig, Rope, RopeScaling
from retro_jax.models.families.family import NAMES, Family, FileFormat, layer_fields, layer_names

# As published for Phi-4-mini, for each of its 48 pairs of channels.
_LONG_FACTORS = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129,
    13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418,
    28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28,
    33.49, 33.5, 44.16, 47.77,
)  # fmt: skip
_LONGROPE = RopeScaling(
    "longrope",
    original_positions=4096,
    attention_factor=math.sqrt(1 + math.log(131072 / 4096) / math.log(4096)),
    factors=_LONG_FACTORS,
    short_factors=(1.0,) * 48,
)
_APART = {f"layers.{{i}}.{part}" for part in ("wq", "wk", "wv", "w_gate", "w_up")}

_MINI = {"tie_embeddings": True, "dtype": "bfloat16"} | layer_fields(
    (LayerKind(Rope(10_000.0, _LONGROPE, channels=96)),) * 32, 131072
)

PHI3 = Family(
    huggingface=FileFormat(
        "phi3",
        defaults={"original_max_position_embeddings": 4096},
        # The last three have no effect in transformers.
        keys=frozenset({"partial_rotary_factor", "full_attn_mod", "interpolate_factor", "lm_head_bias"}),
    ),
    gguf=FileFormat("phi3", keys=frozenset({"rope.dimension_count"})),
    names={path: name for path, name in NAMES.items() if path not in _APART}
    | layer_names(
        ("wqkv", "self_attn.qkv_proj.weight", "attn_qkv.weight"),
        ("w_gate_up", "mlp.gate_up_proj.weight", "ffn_up.weight"),
    ),
    sizes=(
        # name, V, L, N, K, D, M, F, positions
        ModelConfig(
            "phi4", 100352, 40, 40, 10, 128, 5120, 17920, 16384, rope_theta=250_000.0, dtype="bfloat16"
        ),
        ModelConfig("phi4-mini", 200064, 32, 24, 8, 128, 3072, 8192, **_MINI),
    ),
)
