"""Mixtures of experts: a router chooses a few small MLPs for each token, whose weighted outputs are summed.

An expert that any token of a pass chose is read once for all of them, and no other is. One after another is
applied to its own tokens; or, where tokens are few and a function for them is given, all of them are to all
tokens: how long that takes their reading tells alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retro_jax.models.config import Experts, ModelConfig
from retro_jax.models.joined import split_columns, weight

GROUP_ROWS = 128
"""Tokens that an expert is applied to at once, with which its product is bound by arithmetic."""
FEW_TOKENS = 64
"""Up to so many, a product of all of them with an expert is bound by reading the expert."""


@flax.struct.dataclass
class ExpertParams:
    """Weights of the experts of one layer; biases are None where the family has none.

    Several devices have a part of every expert each, not some of the experts: so each reads as much as the
    others, whatever tokens choose, and what they exchange is one sum, as of a dense MLP. Gate and up lie in
    one matrix: see `joined`.
    """

    router: Float[Array, "M E"] = weight()
    gate_up: Float[Array, "E M 2F"] = weight(divided=2)
    down: Float[Array, "E F M"] = weight(divided=1)
    router_bias: Float[Array, " E"] | None = weight(default=None)
    gate_up_bias: Float[Array, "E 2F"] | None = weight(divided=1, default=None)
    down_bias: Float[Array, "E M"] | None = weight(default=None)


@flax.struct.dataclass
class Routed:
    """What a router chose.

    Attributes:
        ids: the experts of each token, by logit the largest first; E for none.
        shares: float32, of their outputs in the token's.
        sizes: tokens of each expert.
    """

    ids: Int[Array, "T k"]
    shares: Float[Array, "T k"]
    sizes: Int[Array, " E"]


FewTokens = Callable[..., tuple[Float[Array, "R M"], Int[Array, ""]]]
"""As `pallas_kernels.mixture_of_experts`."""
ApplyExperts = Callable[
    [ExpertParams, Experts, int, Float[Array, "B T M"], Bool[Array, "B T"]],
    tuple[Float[Array, "B T M"], Float[Array, " B"]],
]
"""As `apply_experts`."""


@dataclass(frozen=True)
class SwiGLU:
    """SwiGLU (arXiv 2002.05202), or gpt-oss's with limits: see `Experts`."""

    limit: float | None
    alpha: float

    def __call__(self, gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What goes into down, elementwise."""
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit) + 1
        return gate * jax.nn.sigmoid(self.alpha * gate) * up


@jax.named_scope("experts")
def apply_experts(
    params: ExpertParams,
    experts: Experts,
    parts: int,
    h: Float[Array, "B T M"],
    valid: Bool[Array, "B T"],
    few: FewTokens | None = None,
) -> tuple[Float[Array, "B T M"], Float[Array, " B"]]:
    """The weighted sum of the outputs of each token's experts.

    Args:
        params: weights.
        experts: sizes, and how shares and gates are computed.
        parts: in which gate and up lie joined.
        h: what goes in, normed.
        valid: tokens that count; the others choose no experts, and get zeros.
        few: what few tokens go through. None: a loop, which waits for its end to be known.

    Returns:
        The sums, float32, and how many experts are read, shared equally by the sequences that have valid
        tokens.
    """
    tokens = h.reshape(-1, h.shape[-1])
    if few is None or len(tokens) > FEW_TOKENS:
        routed = route(params, experts, tokens, valid.ravel())
        out, read = _in_turn(params, experts, parts, tokens, routed), jnp.sum(routed.sizes > 0)
    else:
        out, read = few(
            tokens,
            params.router,
            params.gate_up,
            params.down,
            params.router_bias,
            params.gate_up_bias,
            params.down_bias,
            valid.ravel(),
            per_token=experts.per_token,
            normalized=experts.normalized,
            parts=parts,
            activation=SwiGLU(experts.swiglu_limit, experts.swiglu_alpha),
        )
    active = jnp.any(valid, axis=1)
    read = read / jnp.maximum(jnp.sum(active), 1)
    return out.reshape(h.shape), jnp.where(active, read, 0.0)


def expert_bytes(model: ModelConfig) -> int:
    """Bytes of the weights of one expert of one layer; 0 for a model without experts."""
    if model.experts is None:
        return 0
    weights = 3 * model.width * model.experts.hidden_width
    if model.experts.biases:
        weights += 2 * model.experts.hidden_width + model.width
    return weights * jnp.dtype(model.dtype).itemsize


def experts_read(experts: Experts, tokens: int | float) -> float:
    """How many of the experts so many tokens choose, if each expert is chosen as often as the others."""
    return experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)


def route(params: ExpertParams, experts: Experts, h: Float[Array, "T M"], valid: Bool[Array, " T"]) -> Routed:
    """Chooses the experts of each token."""
    logits = jnp.einsum("tm,me->te", h, params.router, preferred_element_type=jnp.float32)
    if params.router_bias is not None:
        logits += params.router_bias.astype(jnp.float32)
    chosen, ids = lax.top_k(logits, experts.per_token)
    over = chosen if experts.normalized else logits
    shares = jnp.exp(chosen - jax.nn.logsumexp(over, axis=-1, keepdims=True))
    ids = jnp.where(valid[:, None], ids, experts.count)
    return Routed(ids, shares, jnp.sum(ids[..., None] == jnp.arange(experts.count), axis=(0, 1)))


def _in_turn(
    params: ExpertParams, experts: Experts, parts: int, h: Float[Array, "T M"], routed: Routed
) -> Float[Array, "T M"]:
    """One expert after another, for one block of its tokens after another."""
    ids, sizes = routed.ids, routed.sizes
    rows = min(len(h), GROUP_ROWS)
    order = jnp.argsort(ids.ravel())  # pairs of a token and an expert, by expert
    starts = jnp.cumsum(sizes) - sizes
    blocks = -(-sizes // rows)
    ends = jnp.cumsum(blocks)

    def add_block(index, out):
        expert = jnp.sum(ends <= index)
        within = (index - ends[expert] + blocks[expert]) * rows + jnp.arange(rows)
        pairs = order[jnp.minimum(starts[expert] + within, ids.size - 1)]
        tokens = pairs // ids.shape[1]
        y = _expert(params, experts, parts, h[tokens], expert) * routed.shares.ravel()[pairs, None]
        return out.at[jnp.where(within < sizes[expert], tokens, len(h))].add(y, mode="drop")

    return lax.fori_loop(0, ends[-1], add_block, jnp.zeros(h.shape, jnp.float32))


def _expert(
    params: ExpertParams, experts: Experts, parts: int, h: Float[Array, "T M"], expert: Int[Array, ""]
) -> Float[Array, "T M"]:
    """One expert's output for each token, float32."""
    gate_up = h @ params.gate_up[expert]
    if params.gate_up_bias is not None:
        gate_up += params.gate_up_bias[expert]
    activation = SwiGLU(experts.swiglu_limit, experts.swiglu_alpha)
    inner = activation(*split_columns(gate_up, [gate_up.shape[-1] // 2] * 2, parts))
    out = jnp.einsum("tf,fm->tm", inner, params.down[expert], preferred_element_type=jnp.float32)
    return out if params.down_bias is None else out + params.down_bias[expert].astype(jnp.float32)
