"""What a family is: the names and habits of its files, and its published sizes.

What may change here: what families can differ in. A field's default is what the families of today share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from retro_jax.models.config import Experts, LayerKind, ModelConfig, Rope

LayerKinds = tuple[LayerKind, ...]
"""One for each layer."""


class WeightName(NamedTuple):
    """What a weight is called in the two formats, with {i} for the layer.

    With {e} where each expert's is a tensor of its own, else those of all experts are one.
    """

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
    ("sinks", "self_attn.sinks", "attn_sinks.weight"),
    ("wo", "self_attn.o_proj.weight", "attn_output.weight"),
    ("bo", "self_attn.o_proj.bias", "attn_output.bias"),
    ("mlp_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ("w_gate", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("w_up", "mlp.up_proj.weight", "ffn_up.weight"),
    ("w_down", "mlp.down_proj.weight", "ffn_down.weight"),
    ("experts.router", "mlp.gate.weight", "ffn_gate_inp.weight"),
    ("experts.gate", "mlp.experts.{e}.gate_proj.weight", "ffn_gate_exps.weight"),
    ("experts.up", "mlp.experts.{e}.up_proj.weight", "ffn_up_exps.weight"),
    ("experts.down", "mlp.experts.{e}.down_proj.weight", "ffn_down_exps.weight"),
)
"""Path of each parameter to its names in the Llama line, where what some families lack is optional."""


EXPERT_KEYS = frozenset(
    {
        "num_experts", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef",
        "router_jitter_noise",
        "expert_count", "expert_used_count", "expert_feed_forward_length",
    }
)  # fmt: skip
"""Keys of either format about experts that families with them share; some matter in training only."""

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
        packed_experts: in Hugging Face's layout, whether experts lie as those of gpt-oss do (see
            `formats.packed_experts`).
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    layer_kinds: Callable[[Mapping[str, Any], LayerKinds], LayerKinds] = lambda keys, kinds: kinds
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda keys: {}
    norm_offset: float = 0.0
    container: Container | None = None
    packed_experts: bool = False

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


def stated_experts(keys: Mapping[str, Any], default: int) -> int:
    """How many experts a config.json says that there are, by either of the names that it may use."""
    return next(
        (keys[name] for name in ("num_experts", "num_local_experts") if keys.get(name) is not None), default
    )


def in_all_layers(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    """Kinds of layers all of which have experts."""
    return tuple(replace(kind, mlp="experts") for kind in kinds)


def gguf_kinds(keys: Mapping[str, Any], kinds: LayerKinds) -> LayerKinds:
    """Kinds of layers all of which have experts, if the metadata of a GGUF file tell of any."""
    return in_all_layers(keys, kinds) if keys.get("expert_count") else kinds


def gguf_experts(keys: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """As `FileFormat.fields`: the experts that the metadata of a GGUF file tell, with further fields of them.

    Raises:
        ValueError: if it is not told how many of them a token goes through.
    """
    count = keys.get("expert_count")
    if not count:
        return {}
    if not keys.get("expert_used_count"):
        raise ValueError(f"the metadata tell of {count} experts, but no expert_used_count; convert it again")
    width = keys.get("expert_feed_forward_length") or keys["feed_forward_length"]
    return {"experts": Experts(count, keys["expert_used_count"], width, **fields)}


def layer_fields(kinds: LayerKinds, positions: int) -> dict[str, Any]:
    """Fields of `ModelConfig` for layers of these kinds; one rope for all where that is all there is to say.

    A window that has all positions is full attention.

    Args:
        kinds: of the layers, as a file describes them.
        positions: that the file's model is good for.
    """
    fields = {"max_positions": positions}
    kinds = tuple(
        replace(kind, window=None) if kind.window is not None and kind.window >= positions else kind
        for kind in kinds
    )
    rope = kinds[0].rope if kinds else None
    if rope is None or {*kinds} != {LayerKind(Rope(rope.theta, rope.scaling), mlp=kinds[0].mlp)}:
        return fields | {"layer_kinds": kinds}
    return fields | {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
