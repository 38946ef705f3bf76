"""What a learned score is trained towards: the shares of full attention that fall on each page."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import STATISTICS, choose_pages
from pallas_kernels.scores import attention_weights
from retro_jax.learned import learned_queries, page_summaries
from retro_jax.models import LayerKind, LayerParams, LearnedScore, ModelConfig, transformer

QUERIES_AT_ONCE = 256
"""Of dense attention: the most rows of scores that are in memory together."""
LEAST_SHARE = 1e-9
"""Below which an estimate's logarithm is cut off."""


@dataclass(frozen=True)
class Selected:
    """How many pages are chosen where recall is measured. Static.

    Attributes:
      page_size: S.
      pages: of each KV head, the newest and the first included.
    """

    page_size: int
    pages: int


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def dense_layer(
    layer: LayerParams, model: ModelConfig, kind: LayerKind, x: Float[Array, "T M"]
) -> tuple[Float[Array, "T M"], Float[Array, "T N D"], Float[Array, "T K D"]]:
    """A layer with full attention over a chunk: its output, queries and keys."""
    T = x.shape[0]
    q, k, v = (part[0] for part in transformer.qkv(layer, model, kind, x[None], jnp.arange(T)[None]))
    if jax.default_backend() == "gpu" and v.dtype == jnp.bfloat16 and kind.window is None:
        # Which keeps no row of weights in memory.
        o = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation="cudnn")
        x = transformer.attention_output(layer, model, x[None], o)
        return transformer.mlp(layer, model, x)[0], q, k
    rows = min(QUERIES_AT_ONCE, T)
    blocks = -(-T // rows)
    padded = jnp.pad(q, ((0, blocks * rows - T), (0, 0), (0, 0)))

    def block(arguments):
        queries, first = arguments
        weights = token_weights(queries, k, first + jnp.arange(rows), kind.window)
        o = jnp.einsum("kgts,skd->tkgd", weights.astype(v.dtype), v)
        return o.reshape(queries.shape)

    o = lax.map(block, (padded.reshape(blocks, rows, *q.shape[1:]), jnp.arange(blocks) * rows))
    x = transformer.attention_output(layer, model, x[None], o.reshape(1, -1, *q.shape[1:])[:, :T])
    return transformer.mlp(layer, model, x)[0], q, k


def token_weights(
    q: Float[Array, "Q N D"], k: Float[Array, "T K D"], at: Int[Array, " Q"], window: int | None = None
) -> Float[Array, "K G Q T"]:
    """Full attention's weights of the queries at some positions, float32."""
    Q, _, D = q.shape
    grouped = q.reshape(Q, k.shape[1], -1, D)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
    age = at[:, None] - jnp.arange(k.shape[0])
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def page_shares(
    q: Float[Array, "Q N D"], k: Float[Array, "T K D"], at: Int[Array, " Q"], page_size: int
) -> Float[Array, "Q K P"]:
    """The share of full attention that falls on each page, the mean over the query heads of a KV head."""
    shares = jnp.mean(token_weights(q, k, at), axis=1)
    by_page = shares.reshape(*shares.shape[:2], -1, page_size)
    return jnp.swapaxes(jnp.sum(by_page, axis=-1), 0, 1)


def estimated_shares(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    q: Float[Array, "Q N D"],
    k: Float[Array, "T K D"],
    at: Int[Array, " Q"],
) -> Float[Array, "Q K P"]:
    """The same by the score, over the pages before the query's own, which decides what decoding selects.

    The rounding of summaries to 8 bits is passed over by the gradient.
    """
    (T, K, D), S = k.shape, score.page_size
    P = T // S
    keys = jnp.swapaxes(k.reshape(1, P, S, K, D), 2, 3)
    summaries = page_summaries(score, model, kind, keys, jnp.ones((1, P, S), bool), jnp.arange(P)[None])[0]
    kept = STATISTICS["mean_key_int8"].keep(summaries).at_float32()
    summaries += lax.stop_gradient(kept - summaries)
    queries = learned_queries(score, model, kind, q.astype(jnp.float32), at)
    queries = queries.reshape(len(q), K, -1, score.channels)
    logits = jnp.einsum("qkgd,pkd->qkgp", queries, summaries)
    return jnp.mean(attention_weights(logits, _before(at, S, P)[:, :, None], score.channels), axis=2)


def _before(at: Int[Array, " Q"], page_size: int, pages: int) -> Array:
    return jnp.arange(pages) < (at // page_size)[:, None, None]


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def loss_and_gradient(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    q: Float[Array, "T N D"],
    k: Float[Array, "T K D"],
    at: Int[Array, " Q"],
) -> tuple[Float[Array, ""], LearnedScore]:
    """The divergence of estimated from true shares, in nats: the mean over KV heads and some queries.

    Args:
      score: of the layer.
      model: sizes.
      kind: of the layer.
      q: queries of a chunk.
      k: its keys.
      at: positions of the queries that count, none in the first page.
    """
    true = page_shares(q[at], k, at, score.page_size)
    true = jnp.where(_before(at, score.page_size, true.shape[-1]), true, 0)
    true /= jnp.sum(true, axis=-1, keepdims=True)

    def divergence(score):
        estimate = jnp.maximum(estimated_shares(score, model, kind, q[at], k, at), LEAST_SHARE)
        logs = jnp.log(jnp.maximum(true, LEAST_SHARE)) - jnp.log(estimate)
        return jnp.mean(jnp.sum(true * logs, axis=-1))

    return jax.value_and_grad(divergence)(score)


@functools.partial(jax.jit, static_argnames=("model", "kind", "selected"))
def recalls(
    score: LearnedScore,
    model: ModelConfig,
    kind: LayerKind,
    q: Float[Array, "T N D"],
    k: Float[Array, "T K D"],
    at: Int[Array, " Q"],
    selected: Selected,
) -> Float[Array, " 3"]:
    """The share of attention on the pages selected: by the score, by exact attention, by mean keys."""
    S = selected.page_size
    true = page_shares(q[at], k, at, S)
    Q, K, P = true.shape
    means = jnp.mean(k.astype(jnp.float32).reshape(P, S, K, -1), axis=1)
    grouped = q[at].astype(jnp.float32).reshape(Q, K, -1, k.shape[-1])
    logits = jnp.einsum("qkgd,pkd->qkgp", grouped, means)
    by_means = jnp.mean(attention_weights(logits, _before(at, S, P)[:, :, None], k.shape[-1]), axis=2)

    def recall(scores):
        ids, counts = choose_pages(
            scores,
            at,
            jnp.full(Q, selected.pages),
            page_size=S,
            capacity=min(selected.pages, P),
            sink_pages=1,
            implementation="xla",
        )
        counted = jnp.arange(ids.shape[-1]) < counts[..., None]
        return jnp.mean(jnp.sum(jnp.where(counted, jnp.take_along_axis(true, ids, axis=2), 0), axis=-1))

    return jnp.stack(
        [recall(scores) for scores in (estimated_shares(score, model, kind, q[at], k, at), true, by_means)]
    )
