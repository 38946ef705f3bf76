"""Mixtures of experts in plain `jnp`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def mixture_of_experts(
    h: Float[Array, "R M"],
    router: Float[Array, "M E"],
    gate_up: Float[Array, "E M columns"],
    down: Float[Array, "E F M"],
    router_bias: Float[Array, " E"] | None,
    gate_up_bias: Float[Array, "E columns"] | None,
    down_bias: Float[Array, "E M"] | None,
    valid: Bool[Array, " R"],
    *,
    per_token: int,
    normalized: bool,
    parts: int,
    activation: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "R M"], Int[Array, ""]]:
    """See `api.mixture_of_experts`."""
    shares, chosen = choose(h, router, router_bias, valid, per_token, normalized)
    read = jnp.any(chosen, axis=0)
    ids = jnp.argsort(~read)[: len(h) * per_token]  # those that are read, and some of the others

    joined = jnp.einsum("rm,cmf->crf", h, gate_up[ids], preferred_element_type=jnp.float32).astype(h.dtype)
    if gate_up_bias is not None:
        joined += gate_up_bias[ids][:, None]
    by_part = joined.reshape(*joined.shape[:2], parts, 2, -1)
    inner = activation(by_part[..., 0, :], by_part[..., 1, :]).reshape(*joined.shape[:2], -1)
    out = jnp.einsum("crf,cfm->crm", inner, down[ids], preferred_element_type=jnp.float32)
    if down_bias is not None:
        out += down_bias[ids][:, None].astype(jnp.float32)

    weighted = shares.T[ids][..., None] * out
    return jnp.sum(jnp.where(chosen.T[ids][..., None], weighted, 0.0), axis=0), jnp.sum(read)


def choose(
    h: Float[Array, "R M"],
    router: Float[Array, "M E"],
    bias: Float[Array, " E"] | None,
    valid: Bool[Array, " R"],
    per_token: int,
    normalized: bool,
) -> tuple[Float[Array, "R E"], Bool[Array, "R E"]]:
    """Each row's shares of all experts, float32, and which it chose: those of the largest logits."""
    logits = jnp.einsum("rm,me->re", h, router, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    _, ids = lax.top_k(logits, per_token)
    chosen = jnp.any(ids[..., None] == jnp.arange(logits.shape[1]), axis=1)
    weights = jax.nn.softmax(logits, axis=1, where=chosen if normalized else None)
    chosen &= valid[:, None]
    return jnp.where(chosen, weights, 0.0), chosen
