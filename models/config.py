"""What describes a model: its sizes, what kind each of its layers is, and which optional parts they have.

What may change here: a part that layers can differ in is a field of `LayerKind`, any other a field of
`ModelConfig`; its default leaves every model as it is.
"""

import math
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
ROPE_KINDS = ("linear", "llama3", "yarn", "factors", "longrope")
MLPS = ("dense", "experts")
NORMS = ("before", "after", "both")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the positions a model was first trained on.

    Attributes:
        kind: "linear" (every frequency divided by `factor`), "llama3" (Llama 3.1: low frequencies divided,
            high ones kept, smooth between), "yarn" (arXiv 2309.00071, as in Hugging Face transformers),
            "factors" (each frequency divided by its own number, as GGUF files store it), or "longrope" (arXiv
            2402.13753: the same, by other numbers in a model for no more than its original positions).
        factor: the stretch, for linear, llama3 and yarn.
        original_positions: positions of the first training, for llama3, yarn and longrope.
        low_freq_factor: llama3; wavelengths above original_positions / low_freq_factor are divided in full.
        high_freq_factor: llama3; wavelengths below original_positions / high_freq_factor are kept.
        beta_fast: yarn; frequencies that turn more often than this within original_positions are kept.
        beta_slow: yarn; frequencies that turn less often than this are divided in full.
        attention_factor: multiplies cosine and sine. None: 0.1 ln(factor) + 1 for yarn, else 1.
        truncate: yarn; round the ends of the ramp to whole channels.
        factors: a divisor for each pair of channels that are rotated, for factors and longrope.
        short_factors: likewise, for longrope where `ModelConfig.max_positions` are no more than the original
            ones: a text's length must not change how its earlier tokens were rotated, so the model decides.

    Raises:
        ValueError: if the kind is unknown or a field it needs is missing.
    """

    kind: str
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported; use one of {', '.join(ROPE_KINDS)}"
            )
        if self.kind in ("llama3", "yarn", "longrope") and not self.original_positions:
            raise ValueError(
                f"rope scaling {self.kind!r} needs original_positions, got {self.original_positions}"
            )
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor must be positive, got {self.factor}")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer.

    Attributes:
        theta: base of the frequencies.
        scaling: None for plain rotary embedding.
        channels: of each head, the first so many are rotated. None: all D.

    Raises:
        ValueError: if theta is not positive, or the channels are not positive and even.
    """

    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    channels: int | None = None

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {self.theta}")
        if self.channels is not None and (self.channels <= 0 or self.channels % 2):
            raise ValueError(f"rotary channels must be positive and even, got {self.channels}")


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, small MLPs of which a router chooses a few for each token.

    Attributes:
        count: E.
        per_token: experts that a token goes through, those with the largest router logits.
        hidden_width: F of one expert.
        normalized: the chosen experts' shares are a softmax over their own logits and sum to one, as do those
            of a softmax over all experts, divided by their sum. False: they are what the softmax over all
            experts gives the chosen.
        biases: router and experts have biases.
        swiglu_limit: for gpt-oss's SwiGLU, the most that a gate is, and the most that the other factor is in
            size, to which one is added. None: plain SwiGLU.
        swiglu_alpha: what the gate is multiplied by within the sigmoid.

    Raises:
        ValueError: if a size is not positive, or a token goes through more experts than there are.
    """

    count: int
    per_token: int
    hidden_width: int
    normalized: bool = True
    biases: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0

    def __post_init__(self):
        for field in ("count", "per_token", "hidden_width"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} of experts must be positive, got {getattr(self, field)}")
        if self.per_token > self.count:
            raise ValueError(f"a token cannot go through {self.per_token} of {self.count} experts")
        if self.swiglu_limit is not None and self.swiglu_limit <= 0:
            raise ValueError(f"swiglu_limit of experts must be positive, got {self.swiglu_limit}")


@dataclass(frozen=True)
class LayerKind:
    """What tells a layer from others of the same sizes. Layers of one kind share their compiled functions.

    Attributes:
        rope: None for a layer whose queries and keys are not rotated.
        window: latest positions that a query attends to, its own included, for sliding-window attention. None
            for full attention.
        scale: what the products of queries and keys are multiplied by. None: D ** -0.5.
        sinks: each query head has a learned logit that takes part in the softmax and has no value: a share of
            the attention goes nowhere.
        soft_cap: bounds the scaled products c by soft_cap * tanh(c / soft_cap). None: they have no bound.
        mlp: "dense", gated, or "experts", the model's `ModelConfig.experts`.

    Raises:
        ValueError: if the window, the scale or the soft cap is not positive, or the mlp is unknown.
    """

    rope: Rope | None = Rope()
    window: int | None = None
    scale: float | None = None
    sinks: bool = False
    soft_cap: float | None = None
    mlp: str = "dense"

    def __post_init__(self):
        for field in ("window", "scale", "soft_cap"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"{field} of a layer must be positive, got {value}")
        if self.mlp not in MLPS:
            raise ValueError(f"mlp {self.mlp!r} is not supported; use one of {', '.join(MLPS)}")


@dataclass(frozen=True)
class ModelConfig:
    """One model. Static and hashable: pass it to `jax.jit` as a static argument.

    Attributes:
        name: for messages and reports only.
        vocab_size: V.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N.
        head_dim: D, even.
        width: M, of the residual stream.
        hidden_width: F, of the gated MLP of dense layers.
        max_positions: positions the model is good for.
        rope_theta: base of the rotary frequencies, in a model whose layers are of one kind.
        rope_scaling: likewise; None for plain rotary embedding.
        norm_eps: added to the mean square in every RMS norm.
        norms: where attention and mlp have an RMS norm: "before" them, "after" them (OLMo 2), or "both"
            (Gemma 3). What is added to the residual stream has passed the latter.
        float32_norms: weights of norms are float32 whatever the dtype. So in families that store them less
            one (Gemma): bfloat16 would take digits off the sum that it has for what is stored.
        qkv_bias: the q, k and v projections have biases (Qwen2).
        output_bias: the output projection of attention has one (gpt-oss).
        qk_norm: RMS norm over each head's query and key before the rotary embedding (Qwen3).
        joint_qk_norm: beside `qk_norm`: over all heads' queries, and keys, together (OLMo 2).
        activation: of the gate of the mlp: "silu" (SwiGLU), or "gelu_tanh" (GeGLU with GELU by tanh).
        embedding_multiplier: of looked-up embeddings.
        residual_multiplier: of what attention and mlp add to the residual stream.
        logits_divisor: of logits.
        logits_soft_cap: bounds logits l, after their divisor, by logits_soft_cap * tanh(l / logits_soft_cap).
            None: they have no bound.
        tie_embeddings: the output head is the transposed embedding.
        dtype: of weights, activations and KV cache, "float32" or "bfloat16".
        layer_kinds: for a model whose layers differ, the kind of each, which has its own rope. None: full
            attention with `rope_theta` and `rope_scaling` in all of them, and `experts` if there are any.
        experts: of the layers whose mlp is "experts"; None: no layer has any.

    Raises:
        ValueError: if a size or a number that multiplies, divides or bounds is not positive, heads do not
            divide, a word is unknown, rotary channels or factors do not fit, `layer_kinds` are not one for
            each layer or stand beside a rope for all, or `experts` are missing or in no layer.
    """

    name: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    hidden_width: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    norms: str = "before"
    float32_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    activation: str = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None
    tie_embeddings: bool = False
    dtype: str = "float32"
    layer_kinds: tuple[LayerKind, ...] | None = None
    experts: Experts | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "width", "hidden_width")
        numbers = ("embedding_multiplier", "residual_multiplier", "logits_divisor", "logits_soft_cap")
        for field in (*sizes, "max_positions", *numbers):
            if (value := getattr(self, field)) is not None and value <= 0:
                raise ValueError(f"{field} must be positive, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        for field, words in {"dtype": DTYPES, "norms": NORMS, "activation": ACTIVATIONS}.items():
            if getattr(self, field) not in words:
                raise ValueError(
                    f"{field} {getattr(self, field)!r} is not supported; use one of {', '.join(words)}"
                )
        if self.joint_qk_norm and not self.qk_norm:
            raise ValueError("joint_qk_norm says what qk_norm is over, which is off; set both or neither")
        if self.layer_kinds is not None:
            self._check_layer_kinds()
        if any(kind.mlp == "experts" for kind in self.layers) != (self.experts is not None):
            raise ValueError(
                f"experts {self.experts} and layers with mlp 'experts' belong together; give both or neither"
            )
        for rope in {kind.rope for kind in self.layers} - {None}:
            self._check_rope(rope)

    def _check_rope(self, rope: Rope):
        channels = rope.channels or self.head_dim
        if channels > self.head_dim:
            raise ValueError(f"{channels} rotary channels are more than head_dim {self.head_dim}")
        scaling = rope.scaling
        if scaling is None or scaling.kind not in ("factors", "longrope"):
            return
        for factors in (scaling.factors, scaling.short_factors)[: 1 + (scaling.kind == "longrope")]:
            if len(factors) != channels // 2:
                raise ValueError(
                    f"rope scaling has {len(factors)} factors, {channels} rotary channels (head_dim "
                    f"{self.head_dim}) need {channels // 2}"
                )

    def _check_layer_kinds(self):
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(
                f"there are {len(self.layer_kinds)} layer_kinds for num_layers {self.num_layers}; give one "
                "for each layer, or none and rope_theta and rope_scaling for all"
            )
        for field in ("rope_theta", "rope_scaling"):
            if getattr(self, field) != getattr(ModelConfig, field):
                raise ValueError(
                    f"{field} {getattr(self, field)} stands beside layer_kinds, each of which has its own "
                    "rope; leave one of them out"
                )

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        if self.layer_kinds is not None:
            return self.layer_kinds
        mlp = "dense" if self.experts is None else "experts"
        return (LayerKind(Rope(self.rope_theta, self.rope_scaling), mlp=mlp),) * self.num_layers

    @property
    def hidden_widths(self) -> dict[str, int]:
        """F of each kind of MLP that there is in a layer, by the field that says it."""
        widths = {"dense": ("hidden_width", self.hidden_width)}
        if self.experts is not None:
            widths["experts"] = "hidden_width of experts", self.experts.hidden_width
        return dict(widths[mlp] for mlp in sorted({kind.mlp for kind in self.layers}))

    @property
    def parts(self) -> int:
        """The most devices that a layer can be divided over, as many KV heads and hidden channels on each."""
        return math.gcd(self.num_kv_heads, *self.hidden_widths.values())

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads
