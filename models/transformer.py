"""The one transformer behind every model family: pure functions over parameter pytrees.

The pieces (`embed`, `qkv`, `attention_output`, `mlp`, `logits`) leave attention itself to the caller, so that
a decode loop can put any attention between them. `forward` joins them with plain dense attention; it is what
each family is compared with Hugging Face transformers by.

Matrices are stored (in, out) and used as `x @ w`. Layers are separate arrays under an unrolled Python loop:
slicing a stacked array would copy each layer's weights on a CPU. Norms and rotary angles are computed in
float32, the residual stream has the configuration's dtype.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from retro_jax.models.config import Experts, LayerKind, ModelConfig
from retro_jax.models.experts import ApplyExperts, ExpertParams, apply_experts
from retro_jax.models.joined import join_columns, joined_fields, split_columns, weight
from retro_jax.models.learned_score import LearnedScore
from retro_jax.models.rope import apply_rope


@flax.struct.dataclass
class LayerParams:
    """Weights of one layer; biases, norms and sinks are None where the layer has none.

    Query, key and value lie in one matrix, gate and up in another: see `joined`. The latter and `w_down` are
    None in a layer with `experts`. The norms of queries and keys are over one head, or over all of them. A
    learned page score is no checkpoint's, but is put there by `retro_jax.load_score`.
    """

    attn_norm: Float[Array, " M"] | None = weight()
    wqkv: Float[Array, "M QKV"] = weight(divided=1)
    wo: Float[Array, "ND M"] = weight(divided=0)
    mlp_norm: Float[Array, " M"] | None = weight()
    w_gate_up: Float[Array, "M 2F"] | None = weight(divided=1, default=None)
    w_down: Float[Array, "F M"] | None = weight(divided=0, default=None)
    bqkv: Float[Array, " QKV"] | None = weight(divided=0, default=None)
    bo: Float[Array, " M"] | None = weight(default=None)
    q_norm: Float[Array, " D_or_ND"] | None = weight(default=None)
    k_norm: Float[Array, " D_or_KD"] | None = weight(default=None)
    sinks: Float[Array, " N"] | None = weight(divided=0, default=None)
    attn_post_norm: Float[Array, " M"] | None = weight(default=None)
    mlp_post_norm: Float[Array, " M"] | None = weight(default=None)
    experts: ExpertParams | None = None
    page_score: LearnedScore | None = None


@flax.struct.dataclass
class Params:
    """Weights of a model; `head` is None when the embedding is also the output head."""

    embed: Float[Array, "V M"] = weight()
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, " M"] = weight()
    head: Float[Array, "M V"] | None = weight(divided=1, default=None)


def rms_norm(x: Float[Array, "... C"], weight: Float[Array, " C"], eps: float) -> Float[Array, "... C"]:
    """Root-mean-square norm (arXiv 1910.07467) over the last axis, in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _normed(x: Float[Array, "... C"], weight: Float[Array, " C"] | None, config: ModelConfig) -> Array:
    """`rms_norm` by the weight of a norm that there may be."""
    return x if weight is None else rms_norm(x, weight, config.norm_eps)


def _add(
    x: Float[Array, "B T M"],
    branch: Float[Array, "B T M"],
    norm: Float[Array, " M"] | None,
    config: ModelConfig,
) -> Float[Array, "B T M"]:
    """The residual stream with what attention or mlp adds to it."""
    branch = _normed(branch, norm, config)
    if config.residual_multiplier != 1:
        branch = branch * config.residual_multiplier
    return x + branch


@jax.named_scope("embed")
def embed(params: Params, config: ModelConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Looks token ids up."""
    x = params.embed[tokens]
    return x if config.embedding_multiplier == 1 else x * config.embedding_multiplier


def product(x: Float[Array, "B T width"], w: Float[Array, "width columns"]) -> Float[Array, "B T columns"]:
    """The product x @ w, by the matrix unit of a GPU for a single row too.

    XLA would multiply a matrix of less than about ten million numbers by its row and then sum, which takes
    more than three times as long as the product of a few rows.
    """
    if x.size > x.shape[-1] or w.size >= 1 << 24:
        return x @ w
    return lax.platform_dependent(x, w, cuda=_product_of_padded_row, default=jnp.matmul)


PARTS, MOST_ROWS_IN_PARTS = 8, 64


def product_parts(
    x: Float[Array, "B T width"], w: Float[Array, "width columns"]
) -> Float[Array, "parts R columns"]:
    """The product x @ w as parts over the depth that are still to be added, for a kernel that does so.

    XLA divides a product of few rows so too, to keep all of a GPU busy, and then adds the parts in a launch
    of its own. There may be one more row than tokens, since XLA would multiply a small matrix by a lone row
    without the matrix unit; see `product`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MOST_ROWS_IN_PARTS or len(w) % (PARTS * 16):
        return (rows @ w)[None]
    if len(rows) == 1 and w.size < 1 << 24:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    divided = rows.reshape(len(rows), PARTS, -1), w.reshape(PARTS, -1, w.shape[1])
    return jnp.einsum("rpk,pkn->prn", *divided, preferred_element_type=jnp.float32)


def _product_of_padded_row(x: Float[Array, "1 1 width"], w: Float[Array, "width columns"]) -> Array:
    return (jnp.pad(x, ((0, 0), (0, 7), (0, 0))) @ w)[:, :1]


@jax.named_scope("qkv")
def qkv(
    layer: LayerParams,
    config: ModelConfig,
    kind: LayerKind,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Queries, keys, values: optional norm, projections, optional biases and q/k norms, rotary embedding.

    Queries carry the layer's scale, so that every attention multiplies its scores by D ** -0.5 alone.
    """
    return split_heads(layer, config, kind, joined_heads(layer, config, x), positions)


def joined_heads(
    layer: LayerParams, config: ModelConfig, x: Float[Array, "B T M"]
) -> Float[Array, "B T QKV"]:
    """Queries, keys and values as one product of the normed residual stream, without their biases."""
    return product(normed_for_heads(layer, config, x), layer.wqkv)


def normed_for_heads(
    layer: LayerParams, config: ModelConfig, x: Float[Array, "B T M"]
) -> Float[Array, "B T M"]:
    """What queries, keys and values are made of."""
    return _normed(x, layer.attn_norm, config)


def split_heads(
    layer: LayerParams,
    config: ModelConfig,
    kind: LayerKind,
    joined: Float[Array, "B T QKV"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """What `qkv` makes of the product of `joined_heads`."""
    if layer.bqkv is not None:
        joined = joined + layer.bqkv
    widths = joined_fields(config)["wqkv"].values()
    q, k, v = split_columns(joined, [*widths], config.parts)
    if config.joint_qk_norm:
        q, k = _normed(q, layer.q_norm, config), _normed(k, layer.k_norm, config)
    q, k, v = (columns.reshape(*joined.shape[:2], -1, config.head_dim) for columns in (q, k, v))
    if not config.joint_qk_norm:
        q, k = _normed(q, layer.q_norm, config), _normed(k, layer.k_norm, config)
    if kind.scale is not None:
        q = (q.astype(jnp.float32) * query_scale(config, kind)).astype(q.dtype)
    if kind.rope is not None:
        q, k = (apply_rope(heads, positions, kind.rope, config.max_positions) for heads in (q, k))
    return q, k, v


def query_scale(config: ModelConfig, kind: LayerKind) -> float:
    """What queries are multiplied by, beyond the D ** -0.5 of every attention."""
    return 1.0 if kind.scale is None else kind.scale * config.head_dim**0.5


@jax.named_scope("attention_output")
def attention_output(
    layer: LayerParams, config: ModelConfig, x: Float[Array, "B T M"], o: Float[Array, "B T N D"]
) -> Float[Array, "B T M"]:
    """Adds the projected attention output to the residual stream."""
    branch = product(o.astype(x.dtype).reshape(*x.shape[:2], -1), layer.wo)
    if layer.bo is not None:
        branch = branch + layer.bo
    return _add(x, branch, layer.attn_post_norm, config)


def gated_mlp(
    w_gate_up: Float[Array, "M twice_F"],
    w_down: Float[Array, "F M"],
    config: ModelConfig,
    parts: int,
    h: Float[Array, "B T M"],
) -> Float[Array, "B T M"]:
    """What a dense MLP adds for normed `h`: of all `parts`, or of those that a device of several has."""
    gate, up = split_columns(product(h, w_gate_up), [w_down.shape[0]] * 2, parts)
    gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return product(gate * up, w_down)


def mlp(layer: LayerParams, config: ModelConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    """Adds the gated MLP (SwiGLU or GeGLU, arXiv 2002.05202) or chosen experts to the residual stream."""
    return counted_mlp(layer, config, x)[0]


@jax.named_scope("mlp")
def counted_mlp(
    layer: LayerParams,
    config: ModelConfig,
    x: Float[Array, "B T M"],
    valid: Bool[Array, "B T"] | None = None,
    apply_experts: ApplyExperts = apply_experts,
) -> tuple[Float[Array, "B T M"], Float[Array, " B"] | None]:
    """`mlp`, and how many experts it reads.

    Args:
        layer: weights.
        config: sizes.
        x: the residual stream.
        valid: tokens that count; the others choose no experts. None: all.
        apply_experts: how experts are applied.

    Returns:
        The residual stream, and how many experts are read, shared equally by the sequences that have valid
        tokens; None in a layer without experts.
    """
    h, read = _normed(x, layer.mlp_norm, config), None
    if layer.experts is None:
        branch = gated_mlp(layer.w_gate_up, layer.w_down, config, config.parts, h)
    else:
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        branch, read = apply_experts(layer.experts, config.experts, config.parts, h, valid)
    return _add(x, branch, layer.mlp_post_norm, config), read


@jax.named_scope("logits")
def logits(params: Params, config: ModelConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
    """Float32 logits of the next token after each position."""
    h = rms_norm(x, params.final_norm, config.norm_eps)
    if params.head is None:
        logits = jnp.einsum("btm,vm->btv", h, params.embed, preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("btm,mv->btv", h, params.head, preferred_element_type=jnp.float32)
    if config.logits_divisor != 1:
        logits = logits / config.logits_divisor
    return logits if config.logits_soft_cap is None else _soft_capped(logits, config.logits_soft_cap)


def _soft_capped(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    return cap * jnp.tanh(x / cap)


def causal_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    window: int | None = None,
    sinks: Float[Array, " N"] | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N D"]:
    """Dense causal grouped-query attention with a float32 softmax, over the latest `window` keys or all.

    With `sinks`, each head's logit is one more in its softmax, whose weight is then dropped.
    """
    B, T, N, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
    if soft_cap is not None:
        scores = _soft_capped(scores, soft_cap)
    visible = jnp.tril(jnp.ones((T, T), bool))
    if window is not None:
        visible &= ~jnp.tril(visible, -window)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is not None:
        logits = sinks.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(logits, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :T].astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(B, T, N, D)


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: ModelConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Float32 logits after every token, by dense causal attention over the whole sequence."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = embed(params, config, tokens)
    for layer, kind in zip(params.layers, config.layers, strict=True):
        q, k, v = qkv(layer, config, kind, x, positions)
        o = causal_attention(q, k, v, kind.window, layer.sinks, kind.soft_cap)
        x = attention_output(layer, config, x, o)
        x = mlp(layer, config, x)
    return logits(params, config, x)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: Key[Array, ""], shape: tuple[int, ...], scale: float, dtype: str) -> Array:
    """Compiled, so that scaling takes no second copy of a large matrix."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def random_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Seeded random weights, scaled so that activations and attention scores stay of order one.

    The projections that write to the residual stream are smaller by the square root of their number (GPT-2),
    so that tokens remain distinguishable after many layers.
    """
    M, F, D = config.width, config.hidden_width, config.head_dim
    widths = joined_fields(config)
    depth_scale = (2 * config.num_layers) ** -0.5
    draws = 10 if config.experts is None else 16  # of a layer, at most
    keys = iter(jax.random.split(key, draws * config.num_layers + 2))
    sink_keys = jax.random.split(jax.random.fold_in(key, 1), config.num_layers)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Array:
        return _normal(next(keys), (rows, columns), scale * rows**-0.5, config.dtype)

    def joined(field: str, draw: Callable[[int], Array]) -> Array:
        return join_columns([draw(width) for width in widths[field].values()], config.parts)

    def column(size: int) -> Array:
        return _normal(next(keys), (size,), 0.5, config.dtype)

    def norm(size: int, present: bool = True) -> Array | None:
        return jnp.ones(size, "float32" if config.float32_norms else config.dtype) if present else None

    before, after = config.norms != "after", config.norms != "before"
    normed_heads = (config.num_heads, config.num_kv_heads) if config.joint_qk_norm else (1, 1)

    def expert_params(experts: Experts) -> ExpertParams:
        E, inner = experts.count, experts.hidden_width

        def stacked(rows: int, columns: int, scale: float = 1.0) -> Array:
            return _normal(next(keys), (E, rows, columns), scale * rows**-0.5, config.dtype)

        def bias(columns: int) -> Array:
            return _normal(next(keys), (E, columns), 0.1, config.dtype)

        # What goes through a share of each of several experts is less than what goes through one.
        down_scale = depth_scale * experts.per_token**0.5
        return ExpertParams(
            router=matrix(M, E),
            gate_up=joined("gate_up", lambda width: stacked(M, width)),
            down=stacked(inner, M, down_scale),
            router_bias=column(E) if experts.biases else None,
            gate_up_bias=joined("gate_up_bias", bias) if experts.biases else None,
            down_bias=bias(M) if experts.biases else None,
        )

    def layer(kind: LayerKind, sink_key: Key[Array, ""]) -> LayerParams:
        dense = kind.mlp == "dense"
        return LayerParams(
            attn_norm=norm(M, before),
            wqkv=joined("wqkv", lambda width: matrix(M, width)),
            wo=matrix(config.num_heads * D, M, depth_scale),
            mlp_norm=norm(M, before),
            w_gate_up=joined("w_gate_up", lambda width: matrix(M, width)) if dense else None,
            w_down=matrix(F, M, depth_scale) if dense else None,
            bqkv=joined("bqkv", column) if config.qkv_bias else None,
            bo=column(M) if config.output_bias else None,
            q_norm=norm(normed_heads[0] * D, config.qk_norm),
            k_norm=norm(normed_heads[1] * D, config.qk_norm),
            sinks=_normal(sink_key, (config.num_heads,), 1.0, config.dtype) if kind.sinks else None,
            attn_post_norm=norm(M, after),
            mlp_post_norm=norm(M, after),
            experts=None if dense else expert_params(config.experts),
        )

    embed_scale = M**-0.5 if config.tie_embeddings else 1.0
    return Params(
        embed=_normal(next(keys), (config.vocab_size, M), embed_scale, config.dtype),
        layers=tuple(map(layer, config.layers, sink_keys)),
        final_norm=norm(M),
        head=None if config.tie_embeddings else matrix(M, config.vocab_size),
    )
