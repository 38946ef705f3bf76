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
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from retro_jax.models.config import LayerKind, ModelConfig
from retro_jax.models.joined import join_columns, joined_fields, split_columns
from retro_jax.models.learned_score import LearnedScore
from retro_jax.models.rope import apply_rope


def weight(divided: int | None = None, **options: Any) -> Any:
    """A field of weights, and the axis along which several devices have a part each; None: each has all."""
    return flax.struct.field(metadata={"divided": divided}, **options)


@flax.struct.dataclass
class LayerParams:
    """Weights of one layer; biases and q/k norms are None where the family has none.

    Query, key and value lie in one matrix, gate and up in another: see `joined`. A learned page score is no
    checkpoint's, but is put there by `retro_jax.load_score`.
    """

    attn_norm: Float[Array, " M"] = weight()
    wqkv: Float[Array, "M QKV"] = weight(divided=1)
    wo: Float[Array, "ND M"] = weight(divided=0)
    mlp_norm: Float[Array, " M"] = weight()
    w_gate_up: Float[Array, "M 2F"] = weight(divided=1)
    w_down: Float[Array, "F M"] = weight(divided=0)
    bqkv: Float[Array, " QKV"] | None = weight(divided=0, default=None)
    q_norm: Float[Array, " D"] | None = weight(default=None)
    k_norm: Float[Array, " D"] | None = weight(default=None)
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
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("embed")
def embed(params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Looks token ids up."""
    return params.embed[tokens]


@jax.named_scope("qkv")
def qkv(
    layer: LayerParams,
    config: ModelConfig,
    kind: LayerKind,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Queries, keys, values: norm, projections, optional biases and q/k norms, rotary embedding.

    Queries carry the layer's scale, so that every attention multiplies its scores by D ** -0.5 alone.
    """
    h = rms_norm(x, layer.attn_norm, config.norm_eps)
    joined = h @ layer.wqkv
    if layer.bqkv is not None:
        joined = joined + layer.bqkv
    widths = joined_fields(config)["wqkv"].values()
    q, k, v = (
        columns.reshape(*x.shape[:2], -1, config.head_dim)
        for columns in split_columns(joined, [*widths], config.parts)
    )
    if layer.q_norm is not None:
        q = rms_norm(q, layer.q_norm, config.norm_eps)
        k = rms_norm(k, layer.k_norm, config.norm_eps)
    if kind.scale is not None:
        q = (q.astype(jnp.float32) * (kind.scale * config.head_dim**0.5)).astype(q.dtype)
    if kind.rope is not None:
        q, k = apply_rope(q, positions, kind.rope), apply_rope(k, positions, kind.rope)
    return q, k, v


@jax.named_scope("attention_output")
def attention_output(
    layer: LayerParams, x: Float[Array, "B T M"], o: Float[Array, "B T N D"]
) -> Float[Array, "B T M"]:
    """Adds the projected attention output to the residual stream."""
    return x + o.astype(x.dtype).reshape(*x.shape[:2], -1) @ layer.wo


@jax.named_scope("mlp")
def mlp(layer: LayerParams, config: ModelConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    """Adds the gated MLP (SwiGLU, arXiv 2002.05202) to the residual stream."""
    h = rms_norm(x, layer.mlp_norm, config.norm_eps)
    gate, up = split_columns(h @ layer.w_gate_up, [config.hidden_width] * 2, config.parts)
    return x + (jax.nn.silu(gate) * up) @ layer.w_down


@jax.named_scope("logits")
def logits(params: Params, config: ModelConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
    """Float32 logits of the next token after each position."""
    h = rms_norm(x, params.final_norm, config.norm_eps)
    if params.head is None:
        return jnp.einsum("btm,vm->btv", h, params.embed, preferred_element_type=jnp.float32)
    return jnp.einsum("btm,mv->btv", h, params.head, preferred_element_type=jnp.float32)


def causal_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    window: int | None = None,
) -> Float[Array, "B T N D"]:
    """Dense causal grouped-query attention with a float32 softmax, over the latest `window` keys or all."""
    B, T, N, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
    visible = jnp.tril(jnp.ones((T, T), bool))
    if window is not None:
        visible &= ~jnp.tril(visible, -window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(B, T, N, D)


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: ModelConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Float32 logits after every token, by dense causal attention over the whole sequence."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = embed(params, tokens)
    for layer, kind in zip(params.layers, config.layers, strict=True):
        q, k, v = qkv(layer, config, kind, x, positions)
        x = attention_output(layer, x, causal_attention(q, k, v, kind.window))
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
    keys = iter(jax.random.split(key, 10 * config.num_layers + 2))

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Array:
        return _normal(next(keys), (rows, columns), scale * rows**-0.5, config.dtype)

    def joined(field: str, draw: Callable[[int], Array]) -> Array:
        return join_columns([draw(width) for width in widths[field].values()], config.parts)

    def column(size: int) -> Array:
        return _normal(next(keys), (size,), 0.5, config.dtype)

    def norm(size: int, present: bool = True) -> Array | None:
        return jnp.ones(size, config.dtype) if present else None

    def layer() -> LayerParams:
        return LayerParams(
            attn_norm=norm(M),
            wqkv=joined("wqkv", lambda width: matrix(M, width)),
            wo=matrix(config.num_heads * D, M, depth_scale),
            mlp_norm=norm(M),
            w_gate_up=joined("w_gate_up", lambda width: matrix(M, width)),
            w_down=matrix(F, M, depth_scale),
            bqkv=joined("bqkv", column) if config.qkv_bias else None,
            q_norm=norm(D, config.qk_norm),
            k_norm=norm(D, config.qk_norm),
        )

    embed_scale = M**-0.5 if config.tie_embeddings else 1.0
    return Params(
        embed=_normal(next(keys), (config.vocab_size, M), embed_scale, config.dtype),
        layers=tuple(layer() for _ in range(config.num_layers)),
        final_norm=norm(M),
        head=None if config.tie_embeddings else matrix(M, config.vocab_size),
    )
