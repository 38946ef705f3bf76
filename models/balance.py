"""Keys whose channels are of like size, so that 8 bits with one scale for all of a key hold them better.

Some models have channels of keys a hundred times as large as the others, Qwen2.5 for one by its biases: a
scale for the largest leaves the others a few codes. A channel's size can move from the key to the query,
since only their product counts; SmoothAttention of QServe (arXiv 2405.04532) moves the root of sizes measured
on a text, this the whole of the largest that the weights let expect. Factors are powers of two: but for what
is kept in 8 bits, caches and statistics, scores and outputs stay what they were to the last bit.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from retro_jax.models.config import ModelConfig
from retro_jax.models.joined import join_columns, joined_fields, split_columns
from retro_jax.models.transformer import LayerParams, Params

DEVIATIONS = 8
"""How far from its bias a key's channel is expected to come, in standard deviations, on some text."""


def balance_keys(params: Params, config: ModelConfig) -> Params:
    """Weights of the same model with balanced keys.

    Args:
        params: weights; their arrays are given up for the new ones.
        config: sizes of the model.
    """
    return params.replace(layers=tuple(_balanced(layer, config) for layer in params.layers))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="layer")
def _balanced(layer: LayerParams, config: ModelConfig) -> LayerParams:
    if layer.k_norm is not None:  # of all heads; what lies before it, a norm takes off again
        factors = _factors(layer.k_norm.astype(jnp.float32))
        return layer.replace(
            q_norm=layer.q_norm * factors.astype(layer.q_norm.dtype),
            k_norm=layer.k_norm / factors.astype(layer.k_norm.dtype),
        )
    widths = [*joined_fields(config)["wqkv"].values()]
    # What a channel's key is of inputs with unit variance, as the norm leaves them.
    inputs = layer.wqkv * layer.attn_norm[:, None]
    squares = jnp.sum(jnp.square(inputs.astype(jnp.float32)), axis=0)
    largest = DEVIATIONS * jnp.sqrt(squares)
    if layer.bqkv is not None:
        largest += jnp.abs(layer.bqkv.astype(jnp.float32))
    sizes = split_columns(largest, widths, config.parts)[1]
    factors = _factors(sizes.reshape(config.num_kv_heads, config.head_dim))  # [K, D]
    queries = jnp.repeat(factors, config.num_heads // config.num_kv_heads, axis=0)
    by_column = join_columns(
        [queries.ravel(), 1 / factors.ravel(), jnp.ones(widths[2], jnp.float32)], config.parts
    ).astype(layer.wqkv.dtype)
    bqkv = None if layer.bqkv is None else layer.bqkv * by_column
    return layer.replace(wqkv=layer.wqkv * by_column, bqkv=bqkv)


def _factors(sizes: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Powers of two near the sizes; the same for both channels that a rotary embedding mixes."""
    pairs = jnp.max(sizes.reshape(*sizes.shape[:-1], 2, -1), axis=-2, keepdims=True)
    exponents = jnp.round(jnp.log2(jnp.where(pairs > 0, pairs, 1.0))).astype(jnp.int32)
    factors = jnp.ldexp(jnp.ones_like(pairs), exponents)  # exact, as exp2 need not be
    return jnp.broadcast_to(factors, (*sizes.shape[:-1], 2, sizes.shape[-1] // 2)).reshape(sizes.shape)
