"""Mixtures of experts: a router chooses a few small MLPs for each token, whose weighted outputs are summed.

An expert that any token of a pass chose is read once for all of them, and no other is. Either one after
another is applied to its own tokens; or, where a product with chosen matrices is given and tokens are few,
all of them are to all tokens: how long that takes their reading tells alone.
"""

from collections.abc import Callable

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


ChosenProducts = Callable[..., Float[Array, "C T N"]]
"""As `pallas_kernels.chosen_products`."""
ApplyExperts = Callable[
    [ExpertParams, Experts, int, Float[Array, "B T M"], Bool[Array, "B T"]],
    tuple[Float[Array, "B T M"], Float[Array, " B"]],
]
"""As `apply_experts`."""


@jax.named_scope("experts")
def apply_experts(
    params: ExpertParams,
    experts: Experts,
    parts: int,
    h: Float[Array, "B T M"],
    valid: Bool[Array, "B T"],
    products: ChosenProducts | None = None,
) -> tuple[Float[Array, "B T M"], Float[Array, " B"]]:
    """The weighted sum of the outputs of each token's experts.

    Args:
        params: weights.
        experts: sizes, and how shares and gates are computed.
        parts: in which gate and up lie joined.
        h: what goes in, normed.
        valid: tokens that count; the others choose no experts, and get zeros.
        products: of few tokens with chosen matrices. None: a loop, which waits for its end to be known.

    Returns:
        The sums, and how many experts are read, shared equally by the sequences that have valid tokens.
    """
    tokens = h.reshape(-1, h.shape[-1])
    if products is None or len(tokens) > FEW_TOKENS:
        routed = route(params, experts, tokens, valid.ravel())
        out, read = _in_turn(params, experts, parts, tokens, routed), jnp.sum(routed.sizes > 0)
    else:
        # Once for all products. The router's of a single row, XLA would not leave to the matrix unit.
        padded = jnp.pad(tokens, ((0, -len(tokens) % 8), (0, 0)))
        routed = route(params, experts, padded, valid.ravel())
        out, read = _at_once(params, experts, parts, padded, routed, products)
    active = jnp.any(valid, axis=1)
    read = read / jnp.maximum(jnp.sum(active), 1)
    return out.astype(h.dtype).reshape(h.shape), jnp.where(active, read, 0.0)


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


def route(
    params: ExpertParams, experts: Experts, h: Float[Array, "rows M"], valid: Bool[Array, " T"]
) -> Routed:
    """Chooses the experts of each token; there may be more rows than tokens."""
    logits = jnp.einsum("tm,me->te", h, params.router, preferred_element_type=jnp.float32)
    if params.router_bias is not None:
        logits += params.router_bias.astype(jnp.float32)
    chosen, ids = (array[: len(valid)] for array in lax.top_k(logits, experts.per_token))
    if experts.normalized:  # term by term: a sum over an axis would be launched by itself
        weights = jnp.exp(chosen - chosen[:, :1])
        shares = weights / sum(weights[:, j, None] for j in range(experts.per_token))
    else:
        shares = jnp.exp(chosen - jax.nn.logsumexp(logits[: len(valid)], axis=-1, keepdims=True))
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


def _at_once(
    params: ExpertParams,
    experts: Experts,
    parts: int,
    h: Float[Array, "rows M"],
    routed: Routed,
    products: ChosenProducts,
) -> tuple[Float[Array, "T M"], Int[Array, ""] | int]:
    """All chosen experts for all tokens, most of which have no share in most of their outputs.

    By comparisons, and with gaps: a sort or a compaction would take launches of its own.

    Returns:
        The sums, and how many experts are read; of a single token, whose experts differ, at most.
    """
    tokens, per_token = routed.ids.shape
    if tokens == 1:
        chosen = jnp.where(routed.ids[0] == experts.count, -1, routed.ids[0])
    elif experts.count < routed.ids.size:
        chosen = jnp.where(routed.sizes > 0, jnp.arange(experts.count), -1)
    else:
        chosen = _without_repetition(routed.ids.ravel(), experts.count)

    gate_up = products(h[None], params.gate_up, chosen, dtype=h.dtype)
    if params.gate_up_bias is not None:
        gate_up += params.gate_up_bias[chosen][:, None]
    out = products(gated(experts, parts, gate_up), params.down, chosen, dtype=jnp.float32)[:, :tokens]
    if params.down_bias is not None:
        out += params.down_bias[chosen][:, None].astype(jnp.float32)

    # Term by term, as in `route`. What has no share has no meaning.
    if tokens == 1:
        terms = [jnp.where(chosen[j] >= 0, routed.shares[:, j] * out[j], 0.0) for j in range(per_token)]
        return sum(terms), per_token
    shares = sum(
        jnp.where(routed.ids[:, j] == chosen[:, None], routed.shares[:, j], 0.0) for j in range(per_token)
    )[..., None]
    return jnp.sum(jnp.where(shares > 0, shares * out, 0.0), axis=0), jnp.sum(chosen >= 0)


def _without_repetition(ids: Int[Array, " C"], nothing: int) -> Int[Array, " C"]:
    """The ids, and -1 for `nothing` and for what was there before, in one reduction."""
    number = jnp.arange(ids.size)
    before = (ids == ids[:, None]) & (number < number[:, None])
    itself = jnp.where(ids == nothing, -1, ids)
    found = jnp.where(before, -1, jnp.where(number == number[:, None], itself, nothing))
    return jnp.min(found, axis=1)


def _expert(
    params: ExpertParams, experts: Experts, parts: int, h: Float[Array, "T M"], expert: Int[Array, ""]
) -> Float[Array, "T M"]:
    """One expert's output for each token, float32."""
    gate_up = h @ params.gate_up[expert]
    if params.gate_up_bias is not None:
        gate_up += params.gate_up_bias[expert]
    inner = gated(experts, parts, gate_up)
    out = jnp.einsum("tf,fm->tm", inner, params.down[expert], preferred_element_type=jnp.float32)
    return out if params.down_bias is None else out + params.down_bias[expert].astype(jnp.float32)


def gated(experts: Experts, parts: int, gate_up: Float[Array, "... columns"]) -> Float[Array, "... F"]:
    """SwiGLU (arXiv 2002.05202), or gpt-oss's with limits."""
    gate, up = split_columns(gate_up, [gate_up.shape[-1] // 2] * 2, parts)
    if experts.swiglu_limit is not None:
        gate = jnp.minimum(gate, experts.swiglu_limit)
        up = jnp.clip(up, -experts.swiglu_limit, experts.swiglu_limit) + 1
    return gate * jax.nn.sigmoid(experts.swiglu_alpha * gate) * up
