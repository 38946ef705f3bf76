"""The operations of `pallas_kernels` on random inputs of given sizes, ready to be called again and again.

A case says which operation on which sizes, and how many bytes it cannot avoid to move. `prepare` makes
several sets of inputs that the calls take in turn, so that no call finds in a cache what one before it read.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    CODES,
    STATISTICS,
    Pages,
    QuantizedPages,
    Statistics,
    dense_attention,
    pages_for,
    quantize,
    retro_attention,
    select_pages,
    update_pages,
    vector_bytes,
)

ROTATED_BYTES = 128 << 20
"""What the calls of one rotation read together: over twice the 50 MB of an H100's last-level cache."""


@dataclass(frozen=True)
class Dimensions:
    """What all cases share.

    Attributes:
        kv_heads: K.
        group: query heads per KV head.
        head_dim: D.
        page_size: S, tokens.
        dtype: of queries, keys, values and statistics.
        cache_dtype: of keys and values in pages, None for `dtype`.
    """

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: str
    cache_dtype: str | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def vector_bytes(self) -> int:
        """Bytes of one key or value of one KV head in a page."""
        return vector_bytes(self.head_dim, self.cache_dtype or self.dtype)


@dataclass(frozen=True)
class Case:
    """One operation on one size.

    Attributes:
        operation: "attention", "dense", "select" or "update".
        batch: sequences.
        context: tokens of each sequence in the cache.
        share: of the pages, how many attention reads or selection chooses.
        window: slots of attention.
        score: of selection.
        tokens: that an update writes.
        statistics: kept of every page, for selection and update.
        group_reduce: of selection.
    """

    operation: str
    batch: int
    context: int
    share: float = 1.0
    window: int = 1
    score: str = ""
    tokens: int = 0
    statistics: str = "min_max"
    group_reduce: str = "mean"

    def pages(self, dims: Dimensions) -> int:
        """Pages of each sequence."""
        return pages_for(self.context, dims.page_size)

    def selected(self, dims: Dimensions) -> int:
        """Pages that attention reads or selection chooses, per sequence and KV head."""
        forced = 2 if self.operation == "select" else 1  # the first page and the newest
        return min(self.pages(dims), max(forced, round(self.share * self.pages(dims))))

    def name(self, dims: Dimensions) -> str:
        """The sizes in words, without the window."""
        match self.operation:
            case "attention":
                return f"{self.batch}x{self.context}@{self.share:g}"
            case "select":
                by = f"{self.score} of {self.statistics}, {self.group_reduce}"
                return f"{self.batch}x{self.pages(dims)} pages@{self.share:g}, {by}"
            case "update":
                return f"{self.batch}x{self.context}, {self.tokens} tokens, {self.statistics}"
            case _:
                return f"{self.batch}x{self.context}"

    def bytes(self, dims: Dimensions) -> int:
        """Bytes that one call cannot avoid to move, queries and results of attention left out.

        Attention: keys and values of the pages that are read. Selection: the statistics of all pages. Update:
        the keys and values that are written, the keys of the pages that they lie in, those pages' statistics.
        """
        heads = self.batch * dims.kv_heads
        match self.operation:
            case "select":
                return heads * self.pages(dims) * self.kept(dims)
            case "update":
                touched = (self.first_token(dims) + self.tokens - 1) // dims.page_size + 1
                read = 2 * self.tokens + touched * dims.page_size
                return heads * (read * dims.vector_bytes + touched * self.kept(dims))
            case _:
                return heads * self.selected(dims) * 2 * dims.page_size * dims.vector_bytes

    def kept(self, dims: Dimensions) -> int:
        """Bytes of the statistics of one page."""
        statistic = STATISTICS[self.statistics]
        return statistic.vectors * statistic.vector_bytes(dims.head_dim, jnp.dtype(dims.dtype).itemsize)

    def footprint(self, dims: Dimensions) -> int:
        """Bytes of device memory that one set of inputs takes."""
        if self.operation == "select":
            return self.bytes(dims)
        page = 2 * dims.page_size * dims.vector_bytes
        if self.operation == "update":
            page += self.kept(dims)
        return self.batch * dims.kv_heads * self.pages(dims) * page

    def rotated(self, dims: Dimensions) -> int:
        """Bytes of one set that its call can leave in a cache.

        For an update it is the whole set: no two of its calls write to the same place.
        """
        return self.footprint(dims) if self.operation == "update" else self.bytes(dims)

    def first_token(self, dims: Dimensions) -> int:
        """Where in its page an update begins: few tokens then lie inside one page, as they mostly do."""
        return max(0, dims.page_size - self.tokens) // 2


def parse_case(text: str, shared: bool) -> tuple[int, int, float]:
    """Reads "BATCHxCONTEXT@SHARE", or "BATCHxCONTEXT" where there is no share.

    Args:
      text: what was given.
      shared: whether a share belongs to it.

    Returns:
      batch, context in tokens, share.

    Raises:
      ValueError: it is written in another way, or a number is out of its range.
    """
    form = r"(\d+)x(\d+)@(\d*\.?\d+)" if shared else r"(\d+)x(\d+)()"
    like = "BATCHxCONTEXT@SHARE, as 1x32768@0.125" if shared else "BATCHxCONTEXT, as 1x32768"
    found = re.fullmatch(form, text)
    if not found:
        raise ValueError(f"{text!r} is no case; write {like}")
    batch, context, share = int(found[1]), int(found[2]), float(found[3] or 1)
    if min(batch, context) < 1 or not 0 < share <= 1:
        raise ValueError(
            f"{text!r} is out of range: batch and context must be 1 or more, the share within 0..1"
        )
    return batch, context, share


def sets_for(rotated: int, footprint: int, calls: int, memory: int | None) -> int:
    """Returns how many sets of inputs the calls take in turn.

    Enough for `ROTATED_BYTES` in one rotation, but no more than there are calls nor than a quarter of the
    device's memory holds; two at least.

    Args:
      rotated: bytes of one set that its call can leave in a cache.
      footprint: bytes of one set.
      calls: to be timed.
      memory: of the device in bytes, None if it is not known.
    """
    sets = min(pages_for(ROTATED_BYTES, rotated), calls)
    if memory is not None:
        sets = min(sets, memory // 4 // footprint)
    return max(sets, 2)


def device_memory() -> int | None:
    """Returns the bytes that the first device may allocate, None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def prepare(
    case: Case, dims: Dimensions, implementation: str | None, sets: int, calls: int, seed: int
) -> Callable[[int], Any]:
    """Makes the inputs of a case.

    Args:
      case: what to call.
      dims: its other sizes.
      implementation: as in `pallas_kernels`.
      sets: of inputs, taken in turn.
      calls: that will be made, numbered from 0, each once and in order.
      seed: of everything random.

    Returns:
      launches call number i, which is one compiled program, and returns its results.
    """
    makers = {"attention": _attention, "dense": _dense, "select": _select, "update": _update}
    return makers[case.operation](case, dims, implementation, sets, calls, seed)


def random_keys(seed: int) -> Iterator[Array]:
    """Yields keys for `normal` without end."""
    key = jax.random.key(seed, impl="rbg")  # the device's own generator: JAX's takes long to compile
    while True:
        key, used = jax.random.split(key)
        yield used


@partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: Array, shape: tuple[int, ...], dtype: str) -> Float[Array, "..."]:
    """Normal random numbers, made on the device."""
    return jax.random.normal(key, shape, dtype)


def random_page_ids(
    rng: np.random.Generator, rows: tuple[int, int], pages: int, count: int
) -> Int[np.ndarray, "B K C"]:
    """Returns random distinct pages for every row in ascending order, the last page always among them."""
    others = rng.permuted(np.broadcast_to(np.arange(pages - 1), (*rows, pages - 1)), axis=-1)[
        ..., : count - 1
    ]
    newest = np.full((*rows, 1), pages - 1)
    return np.sort(np.concatenate([others, newest], axis=-1), axis=-1).astype(np.int32)


def _attention(case: Case, dims: Dimensions, implementation, sets: int, calls: int, seed: int):
    attend = partial(retro_attention, implementation=implementation)
    return attention_calls(case, dims, attend, sets, calls, seed)


def attention_calls(
    case: Case, dims: Dimensions, attend: Callable[..., Any], sets: int, calls: int, seed: int
) -> Callable[[int], Any]:
    """As `prepare`, for a case of attention by a function with the arguments of `retro_attention`."""
    B, K, W, P = case.batch, dims.kv_heads, case.window, case.pages(dims)
    rng, keys = np.random.default_rng(seed), random_keys(seed)
    pages = [_pages(next(keys), case, dims) for _ in range(sets)]
    queries = [_queries(next(keys), case, dims) for _ in range(sets)]
    page_ids = [jnp.asarray(random_page_ids(rng, (B, K), P, case.selected(dims))) for _ in range(sets)]
    counts = jnp.full((B, K), case.selected(dims), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(case.context - W, case.context, dtype=jnp.int32), (B, W))
    # Half of the pages are new to every slot; a step of the window has loaded the others. Each call has an
    # array of its own: it is updated in place, and a page just loaded is hidden from the older slots.
    recent = rng.integers(case.context - max(W, 2), case.context - 1, (B, K, P))
    start = np.where(rng.random((B, K, P)) < 0.5, -1, recent).astype(np.int32)
    last_loaded = [jnp.array(start) for _ in range(calls)]
    cached_o = normal(next(keys), (B, W - 1, dims.heads, dims.head_dim), "float32")
    cached_lse = normal(next(keys), (B, W - 1, dims.heads), "float32")
    step = jax.jit(attend, donate_argnums=4)

    def call(index: int):
        turn = index % sets
        return step(
            queries[turn],
            pages[turn],
            page_ids[turn],
            counts,
            last_loaded[index],
            positions,
            cached_o,
            cached_lse,
        )

    return call


def _dense(case: Case, dims: Dimensions, implementation, sets: int, calls: int, seed: int):
    keys = random_keys(seed)
    pages = [_pages(next(keys), case, dims) for _ in range(sets)]
    queries = [_queries(next(keys), case, dims) for _ in range(sets)]
    positions = jnp.full((case.batch, 1), case.context - 1, jnp.int32)
    step = jax.jit(partial(dense_attention, implementation=implementation))
    return lambda index: step(queries[index % sets], pages[index % sets], positions)


def _select(case: Case, dims: Dimensions, implementation, sets: int, calls: int, seed: int):
    keys = random_keys(seed)
    statistics = [_statistics(next(keys), case, dims) for _ in range(sets)]
    queries = [_queries(next(keys), case, dims)[:, 0] for _ in range(sets)]
    positions = jnp.full((case.batch,), case.context - 1, jnp.int32)
    budgets = jnp.full((case.batch,), case.selected(dims), jnp.int32)
    options = {"page_size": dims.page_size, "capacity": case.selected(dims)}
    options |= {"score": case.score, "group_reduce": case.group_reduce}
    step = jax.jit(partial(select_pages, implementation=implementation, **options))
    return lambda index: step(queries[index % sets], statistics[index % sets], positions, budgets)


def _update(case: Case, dims: Dimensions, implementation, sets: int, calls: int, seed: int):
    rng, keys = np.random.default_rng(seed), random_keys(seed)
    caches = [(_pages(next(keys), case, dims), _statistics(next(keys), case, dims)) for _ in range(sets)]
    shape = (case.batch, case.tokens, dims.kv_heads, dims.head_dim)
    k, v = normal(next(keys), shape, dims.dtype), normal(next(keys), shape, dims.dtype)
    write = jnp.ones((case.batch, case.tokens), bool)
    # The pages that tokens can begin in without running over the end; all of them before one comes again.
    room = case.pages(dims) - pages_for(case.tokens + dims.page_size - 1, dims.page_size) + 1
    order = np.resize(rng.permutation(room), (calls, case.batch))
    starts = [jnp.asarray(pages * dims.page_size + case.first_token(dims), jnp.int32) for pages in order]
    step = jax.jit(partial(update_pages, implementation=implementation), donate_argnums=(0, 1))

    def call(index: int):
        turn = index % sets
        caches[turn] = step(*caches[turn], k, v, starts[index], write)
        return caches[turn]

    return call


def _pages(key: Array, case: Case, dims: Dimensions) -> Pages:
    shape = (case.batch, dims.kv_heads, case.pages(dims), 2, dims.page_size, dims.head_dim)
    dtype = dims.cache_dtype or dims.dtype
    return _codes(key, shape, dtype) if dtype in CODES else normal(key, shape, dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _codes(key: Array, shape: tuple[int, ...], dtype: str) -> QuantizedPages:
    return QuantizedPages(*quantize(jax.random.normal(key, shape, "bfloat16"), dtype))


def _queries(key: Array, case: Case, dims: Dimensions) -> Float[Array, "B W N D"]:
    return normal(key, (case.batch, case.window, dims.heads, dims.head_dim), dims.dtype)


def _statistics(key: Array, case: Case, dims: Dimensions) -> Statistics:
    statistic = STATISTICS[case.statistics]
    shape = (case.batch, dims.kv_heads, case.pages(dims), statistic.vectors, dims.head_dim)
    values = normal(key, shape, dims.dtype)
    if case.statistics == "min_max":
        values = jnp.abs(values) * jnp.array([-1, 1], dims.dtype)[:, None]  # the lower bound first
    return statistic.keep(values)
