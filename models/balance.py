"""Keys whose channels are of like size, so that 8 bits with one scale for all of a key hold them better.

Some models have channels of keys a hundred times as large as the others, Qwen2.5 for one by its biases: a
scale for the largest leaves the others a few codes. A channel's size can move from the key to the query,
since only their product counts; SmoothAttention of QServe (arXiv 2405.04532) moves it by sizes measured on a
text, this by the weights. Factors are powers of two: but for what is kept in 8 bits, caches and statistics,
scores and outputs stay what they were to the last bit.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from retro_jax.models.config import ModelConfig, Rope
from retro_jax.models.joined import join_columns, joined_fields, split_columns
from retro_jax.models.transformer import LayerParams, Params


def balance_keys(params: Params, config: ModelConfig) -> Params:
    """Weights of the same model with balanced keys.

    Args:
        params: weights; their arrays are given up for the new ones.
        config: sizes of the model.
    """
    layers = zip(params.layers, config.layers, strict=True)
    return params.replace(layers=tuple(_balanced(layer, config, kind.rope) for layer, kind in layers))


@functools.partial(jax.jit, static_argnames=("config", "rope"), donate_argnames="layer")
def _balanced(layer: LayerParams, config: ModelConfig, rope: Rope | None) -> LayerParams:
    rotated = (rope and rope.channels) or config.head_dim
    if layer.k_norm is not None:  # what lies before it, a norm takes off again
        sizes = layer.k_norm.astype(jnp.float32).reshape(-1, config.head_dim)  # one for all heads, or of each
        factors = _factors(sizes, rotated)
        queries = _of_queries(factors, config) if config.joint_qk_norm else factors
        return layer.replace(
            q_norm=layer.q_norm * queries.ravel().astype(layer.q_norm.dtype),
            k_norm=layer.k_norm / factors.ravel().astype(layer.k_norm.dtype),
        )
    widths = [*joined_fields(config)["wqkv"].values()]
    # What a channel's key is of inputs with unit variance, as the norm leaves them.
    inputs = layer.wqkv
    if layer.attn_norm is not None:
        inputs = inputs * layer.attn_norm[:, None].astype(inputs.dtype)
    squares = jnp.sum(jnp.square(inputs.astype(jnp.float32)), axis=0)
    if layer.bqkv is not None:
        squares += jnp.square(layer.bqkv.astype(jnp.float32))
    sizes = jnp.sqrt(split_columns(squares, widths, config.parts)[1])
    factors = _factors(sizes.reshape(config.num_kv_heads, config.head_dim), rotated)  # [K, D]
    queries = _of_queries(factors, config)
    by_column = join_columns(
        [queries.ravel(), 1 / factors.ravel(), jnp.ones(widths[2], jnp.float32)], config.parts
    ).astype(layer.wqkv.dtype)
    bqkv = None if layer.bqkv is None else layer.bqkv * by_column
    return layer.replace(wqkv=layer.wqkv * by_column, bqkv=bqkv)


def _of_queries(factors: Float[Array, "K D"], config: ModelConfig) -> Float[Array, "N D"]:
    return jnp.repeat(factors, config.group, axis=0)


def _factors(sizes: Float[Array, "heads D"], rotated: int) -> Float[Array, "heads D"]:
    """Powers of two near the roots of the sizes; the same for both channels that a rotary embedding mixes.

    The root, as in SmoothAttention: whole sizes left a text worse than before, presumably where a key is far
    from what the weights tell.
    """
    pairs = jnp.max(sizes[:, :rotated].reshape(len(sizes), 2, -1), axis=1)
    sizes = jnp.concatenate([pairs, pairs, sizes[:, rotated:]], axis=1)
    exponents = jnp.round(jnp.log2(jnp.where(sizes > 0, sizes, 1.0)) / 2).astype(jnp.int32)
    return jnp.ldexp(jnp.ones_like(sizes), exponents)  # exact, as exp2 need not be
