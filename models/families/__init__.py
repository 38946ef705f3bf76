"""Model families: each file says what one family's files say, and its published sizes.

What may change here: another family is another file and its place in `FAMILIES`. A family says what its
weights are called, what missing keys of its config.json and GGUF metadata mean, which further keys it reads,
and of what kind each layer is (`family.py`); `formats` reads the files by that.
"""

from retro_jax.models.families.family import Family
from retro_jax.models.families.gemma3 import GEMMA3
from retro_jax.models.families.gpt_oss import GPT_OSS
from retro_jax.models.families.granite import GRANITE
from retro_jax.models.families.llama import LLAMA
from retro_jax.models.families.mistral import MISTRAL
from retro_jax.models.families.mixtral import MIXTRAL
from retro_jax.models.families.olmo2 import OLMO2
from retro_jax.models.families.olmoe import OLMOE
from retro_jax.models.families.phi3 import PHI3
from retro_jax.models.families.qwen2 import QWEN2
from retro_jax.models.families.qwen3 import QWEN3
from retro_jax.models.families.qwen3_moe import QWEN3_MOE
from retro_jax.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, OLMO2, PHI3, SMOLLM3, GRANITE, MIXTRAL, QWEN3_MOE,
    OLMOE, GPT_OSS,
)  # fmt: skip


def huggingface_families() -> dict[str, Family]:
    """Families that come in Hugging Face's layout, by the `model_type` of their config.json.

    A family whose models can lie in a container is there under the container's, too.
    """
    found = {}
    for family in FAMILIES:
        if family.huggingface:
            found[family.huggingface.name] = family
            if family.huggingface.container:
                found[family.huggingface.container.name] = family
    return found


def gguf_families() -> dict[str, Family]:
    """Families that come in GGUF files, by the `general.architecture` of their metadata."""
    return {family.gguf.name: family for family in FAMILIES if family.gguf}
