"""Verified decoding: tokens drafted by sparse attention, checked by one dense pass over them.

Speculative sampling (arXiv 2211.17192) with the model as its own draft, on its own cache. It generates what
full attention generates with the same random keys, token for token, but for ties within rounding: draft and
check draw the token of a position with the same noise (the Gumbel noise of the sequence's key and of the
position, see `sampling.sample`), so that a draft is accepted if and only if it is full attention's choice.

Draft and check read and write one cache: in 8 bits (`DecodeConfig.cache_dtype`) the text is that of full
attention with such a cache.

Behind the last token that is kept the cache is full attention's: the pass writes keys and values of the
drafts anew, and page statistics are those of the tokens that are kept. A draft begins with an empty window,
as after a prompt, and revises its own tokens only; what it loaded and its outputs are forgotten with it. What
drafts overwrite in the ring of a sliding window is put back.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels.settings import under_fixed_settings
from retro_jax.cache import LayerState
from retro_jax.config import DecodeConfig
from retro_jax.decode import negative_log_likelihood
from retro_jax.dense import dense_hidden
from retro_jax.drafts import Acceptance, RoundMetrics, weight_bytes
from retro_jax.exact_cache import keep
from retro_jax.inputs import check_bools, check_counts, check_ints, check_keys
from retro_jax.models import transformer
from retro_jax.models.config import ModelConfig
from retro_jax.models.transformer import Params
from retro_jax.plan import layer_plan
from retro_jax.sampling import Sampling, sample, sequence_keys
from retro_jax.sliding import read_rings, restore_rings
from retro_jax.state import DecodeState
from retro_jax.step import decode_step, full_cache_bytes


@flax.struct.dataclass
class VerifiedTokens:
    """What `verified_step` or `verified_decode` produced; T is k + 1, or that for each round.

    Attributes:
      tokens: the tokens of each round; without meaning where `emitted` is False.
      emitted: which of them the sequence generated; the first ones of each round.
      logprobs: natural logarithm of each token's probability in full attention's whole distribution, at
        temperature 1 whatever the sampling.
      finite: whether all logits that chose the token were finite.
      pending: the last token of each sequence, chosen but not yet in the cache.
      metrics: of the round; of every round, stacked in front.
    """

    tokens: Int[Array, "B T"]
    emitted: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    finite: Bool[Array, "B T"]
    pending: Int[Array, " B"]
    metrics: RoundMetrics


@flax.struct.dataclass
class VerifiedDecoded(VerifiedTokens):
    """What `verified_decode` produced.

    Attributes:
      remaining: tokens that each sequence may still emit; 0 once it has ended, by a stop token or for want
        of room in the cache.
      acceptance: to go on with in the next call.
    """

    remaining: Int[Array, " B"]
    acceptance: Acceptance


def check_verify(
    config: DecodeConfig, k: int, capacity: int | None = None, model: ModelConfig | None = None
) -> None:
    """Raises if drafts of up to `k` tokens cannot be made by `config`, or not be checked.

    Args:
      config: how to draft.
      k: the bound.
      capacity: tokens per sequence that the cache holds; None: not known yet.
      model: the model's configuration; likewise.

    Raises:
      TypeError: k is not a whole number.
      ValueError: k is below 1, or the cache or a sliding window does not hold so many drafts; the method is
        dense or evicts; or the configuration rectifies.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"verify is {k!r}; give a whole number of drafts, or None for no verification")
    if k < 1:
        raise ValueError(f"verify {k} is below 1; use None for no verification")
    asked = f"verify {k} was asked for with"
    if config.attention.dense:
        raise ValueError(
            f"{asked} method {config.method!r}, whose drafts would read as much as their check; draft by "
            "'quest' or 'retro', or use verify None, which gives the same text"
        )
    if config.eviction:
        raise ValueError(
            f"{asked} method {config.method!r}, evict {config.evict!r}, which evicts pages that the check "
            "needs; draft by 'quest' or 'retro' without evict, which keep every page"
        )
    if config.rectify_every:
        raise ValueError(
            f"{asked} rectify_every {config.rectify_every}, but every check leaves an exact cache already; "
            "use rectify_every None"
        )
    rings = layer_plan(model, config).rings if model else ()
    ring = min((ring for ring in rings if ring is not None), default=k + 1)
    if k >= ring:
        raise ValueError(
            f"verify {k} and the token before the drafts do not fit the {ring} tokens that are kept for a "
            f"sliding window of {model.name}; use a smaller verify"
        )
    if capacity is not None and k >= capacity:
        raise ValueError(
            f"verify {k} and the token before the drafts do not fit a cache of {capacity} tokens; use a "
            "smaller verify or a larger capacity"
        )


@under_fixed_settings
def verified_step(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, " B"],
    k: int,
    drafts: Int[Array, " B"] | None = None,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    stop_tokens: Int[Array, " stops"] | None = None,
    active: Bool[Array, " B"] | None = None,
) -> tuple[DecodeState, VerifiedTokens]:
    """One round: draft up to k tokens per sequence, check them, keep what full attention would have chosen.

    A sequence gets from 1 to k + 1 tokens, each with one pass more than its drafts. The state is that of a
    dense pass over the tokens that were kept (`extend`), whatever was drafted.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to draft; static.
      state: with an exact cache, as prompts and verified tokens leave it; after sparse steps (`decode_step`)
        the output is not full attention's. Donate it.
      tokens: the newest token ids, at position `state.length`.
      k: drafts at most; static.
      drafts: how many to draft for each sequence, 0..k; fewer where it has no room (`state.room`), and none
        behind a stop token. None: k.
      sampling: how tokens are chosen; static. None: greedy.
      keys: one random key per sequence; None: from `sampling.seed`.
      stop_tokens: nothing is kept behind one of these.
      active: sequences to decode; the others, and those without room, keep their state. None: all.

    Returns:
      The new state, and the tokens.

    Raises:
      ValueError: see `check_verify`; or an array is not one for each sequence of the state, stop_tokens are
        no list, or (outside of a trace) a number of drafts is not within 0..k.
      TypeError: token ids or numbers are not whole, active is not made of truth values, or keys are not those
        of `jax.random.key`.
    """
    check_verify(config, k, state.capacity, model)
    (B,), each = state.length.shape, "one for each sequence of the state"
    tokens = check_ints(tokens, (B,), "tokens", each)
    drafts = check_ints(jnp.full(B, k) if drafts is None else drafts, (B,), "drafts", each)
    check_counts(drafts, 0, k, "drafts")
    active = check_bools(jnp.ones(B, bool) if active is None else active, (B,), "active", each)
    sampling = sampling or Sampling()
    keys = sequence_keys(sampling, B) if keys is None else check_keys(keys, B)
    stop_tokens = _stop_tokens(stop_tokens)

    room = state.room(model)
    active &= room > 0
    drafts = jnp.where(active, jnp.clip(drafts, 0, jnp.minimum(k, room - 1)), 0)
    state, overwritten = read_rings(model, config, state, k + 1)
    layers, row, drafted, draft_bytes = _draft(
        params, model, config, state, tokens, drafts, k, sampling, keys, stop_tokens
    )
    everything = jnp.ones((B, k + 1), bool)
    layers = restore_rings(model, config, layers, overwritten, state.length, everything)

    # Of the pages only: the statistics wait for what is kept.
    bare = state.replace(layers=tuple(LayerState(layer.pages) for layer in layers))
    passed = jnp.where(active, drafted + 1, 0)
    bare, h = dense_hidden(params, model, config, bare, row, passed, config.implementation)
    logits = transformer.head(params, model, h)
    positions = state.length[:, None] + jnp.arange(1, k + 2)
    flat = logits.reshape(B * (k + 1), -1)
    chosen = sample(flat, sampling, jnp.repeat(keys, k + 1), positions.reshape(-1))
    logprobs = -negative_log_likelihood(flat, chosen).reshape(B, k + 1)
    chosen = chosen.reshape(B, k + 1)

    agrees = (chosen[:, :k] == row[:, 1:]) & (jnp.arange(k) < drafted[:, None])
    accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)
    stops = _is_stop(chosen, stop_tokens)
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), k)
    kept = jnp.where(active, jnp.minimum(accepted, first_stop) + 1, 0)
    emitted = jnp.arange(k + 1) < kept[:, None]
    last = jnp.take_along_axis(chosen, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]

    layers = tuple(
        drawn.replace(pages=exact.pages, last_loaded=before.last_loaded, outputs=before.outputs)
        for drawn, exact, before in zip(layers, bare.layers, state.layers, strict=True)
    )
    start = state.length
    layers = restore_rings(model, config, layers, overwritten, start, ~emitted)
    state = keep(params, model, config, state.replace(layers=layers), start, kept, k + 1)
    metrics = RoundMetrics(
        drafted=drafted,
        accepted=accepted,
        emitted=kept,
        draft_bytes=draft_bytes,
        check_bytes=jnp.where(active, full_cache_bytes(model, config, start + passed), 0.0),
    )
    return state, VerifiedTokens(
        tokens=chosen,
        emitted=emitted,
        logprobs=logprobs,
        finite=jnp.all(jnp.isfinite(logits), axis=-1) | ~emitted,
        pending=jnp.where(active, last, tokens),
        metrics=metrics,
    )


@under_fixed_settings
def verified_decode(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    first_tokens: Int[Array, " B"],
    rounds: int,
    k: int,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    stop_tokens: Int[Array, " stops"] | None = None,
    remaining: Int[Array, " B"] | None = None,
    acceptance: Acceptance | None = None,
    adapt: bool = True,
) -> tuple[DecodeState, VerifiedDecoded]:
    """`rounds` rounds of `verified_step`: from one to k + 1 tokens per sequence and round.

    Args:
      params: weights.
      model: the model's configuration; static.
      config: how to draft; static.
      state: with an exact cache, see `verified_step`. Donate it. A sequence that has no room left ends.
      first_tokens: the tokens to start from: chosen, but not in the cache yet.
      rounds: of the scan; static.
      k: drafts of a round at most; static.
      sampling: how tokens are chosen; static. None: greedy.
      keys: one random key per sequence; None: from `sampling.seed`.
      stop_tokens: a sequence that chooses one of these has ended.
      remaining: tokens that each sequence may still emit; it ends at 0. None: no limit.
      acceptance: of an earlier call; None: nothing is known yet.
      adapt: draft as many as the acceptance so far makes pay (see `drafts`), at least 1; else always k.
        Static.

    Raises:
      ValueError: see `verified_step`; rounds are below 1, or remaining not one for each sequence.
      TypeError: see `verified_step`.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} are below 1")
    check_verify(config, k, state.capacity, model)
    (B,), each = state.length.shape, "one for each sequence of the state"
    first_tokens = check_ints(first_tokens, (B,), "first_tokens", each)
    remaining = jnp.full(B, jnp.iinfo(jnp.int32).max) if remaining is None else remaining
    remaining = check_ints(remaining, (B,), "remaining", each)
    acceptance = Acceptance.unknown(B) if acceptance is None else acceptance
    stop_tokens = _stop_tokens(stop_tokens)
    weights = [weight_bytes(params, model, B * tokens) for tokens in range(1, k + 2)]

    def a_round(carry, _):
        state, tokens, remaining, acceptance = carry
        active = (remaining > 0) & (state.room(model) > 0)
        drafts = acceptance.best_drafts(k, active, weights) if adapt else k
        drafts = jnp.clip(remaining - 1, 0, drafts)
        state, out = verified_step(
            params, model, config, state, tokens, k, drafts, sampling, keys, stop_tokens, active
        )
        stopped = _is_stop(out.pending, stop_tokens)
        remaining = jnp.where(active & ~stopped, remaining - out.metrics.emitted, 0)
        return (state, out.pending, remaining, acceptance.after(out.metrics)), out

    carry = state, first_tokens, remaining, acceptance
    (state, pending, remaining, acceptance), out = lax.scan(a_round, carry, length=rounds)
    tokens, emitted, logprobs, finite = (
        array.swapaxes(0, 1).reshape(B, -1) for array in (out.tokens, out.emitted, out.logprobs, out.finite)
    )
    return state, VerifiedDecoded(
        tokens, emitted, logprobs, finite, pending, out.metrics, remaining, acceptance
    )


def _draft(
    params: Params,
    model: ModelConfig,
    config: DecodeConfig,
    state: DecodeState,
    tokens: Int[Array, " B"],
    drafts: Int[Array, " B"],
    k: int,
    sampling: Sampling,
    keys: Key[Array, " B"],
    stop_tokens: Int[Array, " stops"],
) -> tuple[tuple[LayerState, ...], Int[Array, "B T"], Int[Array, " B"], Float[Array, " B"]]:
    """Sparse steps behind the state, as many as the longest draft takes.

    Returns:
      The layers; per sequence the newest token and its drafts in k + 1 places; how many were drafted; and the
      bytes that the steps read.
    """

    def any_active(carry):
        return jnp.any(carry[2])

    def step(carry):
        state, row, active, index, drafted, read = carry
        newest = lax.dynamic_index_in_dim(row, index, axis=1, keepdims=False)
        state, logits = decode_step(params, model, config, state, newest, active)
        chosen = sample(logits, sampling, keys, state.length)
        row = row.at[:, index + 1].set(jnp.where(active, chosen, 0))
        drafted += active
        read += state.metrics.kv_bytes
        active &= (drafted < drafts) & ~_is_stop(chosen, stop_tokens)
        return state, row, active, index + 1, drafted, read

    row = jnp.zeros((tokens.shape[0], k + 1), jnp.int32).at[:, 0].set(tokens)
    # With an empty window, so that no key or value before the drafts is revised.
    begun = state.replace(decoded=jnp.zeros_like(state.decoded))
    carry = begun, row, drafts > 0, jnp.int32(0), jnp.zeros_like(drafts), jnp.zeros(drafts.shape, jnp.float32)
    state, row, _, _, drafted, read = lax.while_loop(any_active, step, carry)
    return state.layers, row, drafted, read


def _stop_tokens(stop_tokens: Int[Array, " stops"] | None) -> Int[Array, " stops"]:
    stop_tokens = jnp.zeros(0, jnp.int32) if stop_tokens is None else stop_tokens
    return check_ints(stop_tokens, (jnp.size(stop_tokens),), "stop_tokens", "a list")


def _is_stop(tokens: Int[Array, "*B"], stop_tokens: Int[Array, " stops"]) -> Bool[Array, "*B"]:
    return jnp.any(tokens[..., None] == stop_tokens, axis=-1)
