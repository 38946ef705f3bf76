"""What a family is: the names and habits of its files, and its published sizes.

What may change here: what families can differ in. A field's default is what the families of today share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from retro_jax.models.config import LayerKind, ModelConfig, Rope

LayerKinds = tuple[LayerKind, ...]
"""One for each layer."""


class WeightName(NamedTuple):
    """What a weight is called in the two formats, with {i} for the layer."""

    huggingface: str
    gguf: str


def layer_names(*names: tuple[str, str, str]) -> dict[str, WeightName]:
    """Names of a layer's weights: of each the field of `LayerParams` and the ends of both formats' names."""
    return {
        f"layers.{{i}}.{field}": WeightName(f"model.layers.{{i}}.{huggingface}", f"blk.{{i}}.{gguf}")
        for field, huggingface, gguf in names
    }


NAMES = {
    "embed": WeightName("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": WeightName("model.norm.weight", "output_norm.weight"),
    "head": WeightName("lm_head.weight", "output.weight"),
} | layer_names(
    ("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
    ("wq", "self_attn.q_proj.weight", "attn_q.weight"),
    ("wk", "self_attn.k_proj.weight", "attn_k.weight"),
    ("wv", "self_attn.v_proj.weight", "attn_v.weight"),
    ("bq", "self_attn.q_proj.bias", "attn_q.bias"),
    ("bk", "self_attn.k_proj.bias", "attn_k.bias"),
    ("bv", "self_attn.v_proj.bias", "attn_v.bias"),
    ("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("wo", "self_attn.o_proj.weight", "attn_output.weight"),
    ("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ("w_gate", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("w_up", "mlp.up_proj.weight", "ffn_up.weight"),
    ("w_down", "mlp.down_proj.weight", "ffn_down.weight"),
)
"""Path of each parameter to its names in the Llama line, where the biases and q/k norms are optional."""

NORMS_AFTER = layer_names(
    ("attn_post_norm", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("mlp_post_norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)
"""Names of the norms of what attention and mlp add to the residual stream."""


@dataclass(frozen=True)
class Container:
    """What a language model's files can lie in, with a vision model beside it.

    Attributes:
        name: `model_type` of the whole, whose config.json holds that of the language model as text_config.
        prefixes: how names of weights begin in the whole: pairs of a beginning and what stands for it there,
            one for each layout that there is.
        others: beginnings of the names of all other weights, which are left out.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class FileFormat:
    """How one format describes the models of a family.

    Attributes:
        name: `model_type` in config.json, `general.architecture` in GGUF.
        defaults: keys that may be missing, with what they are then taken for: in config.json by transformers,
            in GGUF, without the architecture's name, by llama.cpp. A function of the keys, those before it
            completed, stands for null as well.
        keys: further keys that `layer_kinds` or `fields` reads, or whose part is computed here for this
            family, which would be refused or reported else.
        values: keys for which only these values are as the family is computed here.
        layer_kinds: from the keys of a file and the kinds that the common keys say to the model's own.
        fields: further fields of `ModelConfig`, from the keys of a file.
        norm_offset: what is added to the stored weights of norms.
        container: in config.json, what the model can lie in; None: it stands alone.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    layer_kinds: Callable[[Mapping[str, Any], LayerKinds], LayerKinds] = lambda keys, kinds: kinds
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda keys: {}
    norm_offset: float = 0.0
    container: Container | None = None

    def complete(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a file, with what is missing among them."""
        completed = {**self.defaults, **keys}
        for key, default in self.defaults.items():
            if callable(default):
                stated = keys.get(key)
                completed[key] = default(completed) if stated is None else stated
        return completed


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        huggingface: what its config.json says; None if the family does not come so.
        gguf: what its GGUF metadata say; likewise.
        parts: fields of `ModelConfig` that all its models share. Where it says nothing of biases and of q/k
            norms, a GGUF file's tensors tell.
        names: path of each parameter, as in `Params`, to what checkpoints call it. Matrices that lie in one
            in `LayerParams` have one name if they do so in checkpoints, or else one each.
        gguf_interleaved: GGUF files hold rows of q and k as interleaved rotary pairs, not as split halves.
        sizes: published ones, for `random:NAME`; the first fields of `ModelConfig` by place.
    """

    huggingface: FileFormat | None = None
    gguf: FileFormat | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, WeightName] = field(default_factory=lambda: NAMES)
    gguf_interleaved: bool = False
    sizes: tuple[ModelConfig, ...] = ()


def layer_fields(kinds: LayerKinds, positions: int) -> dict[str, Any]:
    """Fields of `ModelConfig` for layers of these kinds; one rope for all where that is all there is to say.

    Sliding windows become a limit of the positions, up to which they are full attention.

    Args:
        kinds: of the layers, as a file describes them.
        positions: that the file's model is good for.
    """
    fields = {"max_positions": min([positions, *(kind.window for kind in kinds if kind.window is not None)])}
    kinds = tuple(replace(kind, window=None) for kind in kinds)
    rope = kinds[0].rope if kinds else None
    if rope is None or {*kinds} != {LayerKind(Rope(rope.theta, rope.scaling))}:
        return fields | {"layer_kinds": kinds}
    return fields | {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
