"""Model families: each file says what one family's files say, and its published sizes.

What may change here: another family is another file and its place in `FAMILIES`. A family says what its
weights are called, what missing keys of its config.json and GGUF metadata mean, which further keys it reads,
and of what kind each layer is (`family.py`); `formats` reads the files by that.
"""

from retro_jax.models.families.family import Family
from retro_jax.models.families.llama import LLAMA
from retro_jax.models.families.mistral import MISTRAL
from retro_jax.models.families.mixtral import MIXTRAL
from retro_jax.models.families.qwen2 import QWEN2
from retro_jax.models.families.qwen3 import QWEN3
from retro_jax.models.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)


def huggingface_families() -> dict[str, Family]:
    """Families that come in Hugging Face's layout, by the `model_type` of their config.json."""
    return {family.huggingface.name: family for family in FAMILIES if family.huggingface}


def gguf_families() -> dict[str, Family]:
    """Families that come in GGUF files, by the `general.architecture` of their metadata."""
    return {family.gguf.name: family for family in FAMILIES if family.gguf}
