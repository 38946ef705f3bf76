"""The fields of `DecodeConfig` and `Sampling`: their defaults and what they mean.

The classes that check them know methods, scores and kernels, and so need JAX. What only shows or reads the
fields, such as a command line, imports no more than this.
"""

import functools
import numbers
import typing
from dataclasses import dataclass

_KINDS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"), str: (str, "a word")}
_KINDS |= {bool: (bool, "True or False"), type(None): (type(None), "None")}
MOST_SEED = 2**32 - 1
"""JAX would cut a larger one to its last 32 bits."""


@functools.cache
def _allowed(fields: type) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(fields)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def check_types(values: object, fields: type) -> None:
    """Raises TypeError if a value is not of the type that a field of `fields` says; True is no number."""
    for name, kinds in _allowed(fields).items():
        value = getattr(values, name)
        if not any(
            isinstance(value, _KINDS[kind][0]) and isinstance(value, bool) == (kind is bool) for kind in kinds
        ):
            wanted = " or ".join(_KINDS[kind][1] for kind in kinds)
            raise TypeError(f"{name} is {value!r}; give {wanted}")


def check_seed(**seeds: int) -> None:
    """Raises ValueError if a seed is none of JAX's random numbers."""
    for name, seed in seeds.items():
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"{name} {seed} is not within 0..{MOST_SEED}; use one that is")


@dataclass(frozen=True)
class DecodeFields:
    """How to decode, unchecked."""

    method: str = "retro"
    """What attention past the dense layers does: "full" (every page), "quest" (the pages that score best
    for the newest query), "retro" (Quest, and every loaded page also revises the last queries); or what
    remains after evicting pages for good: "streaming" (sink pages and recent ones), "tova" (what the newest
    query attends to least goes), "h2o" (what all queries attended to most stays, and recent pages),
    "snapkv" (the end of the prompt decides what stays of it; then the cache grows) or "expected" (what
    later queries are expected to attend to stays of the prompt; then the cache grows)."""
    window: int | None = None
    """Queries that one step serves, the newest included. None: the method's own, 4 for "retro" and 1
    for the others, which take no other."""
    budget: float = 0.15
    """Share of the current context that a step may load per layer and KV head."""
    budget_floor: int = 256
    """Tokens that a step may load at least, where the budget is a share."""
    budget_tokens: int | None = None
    """A fixed number of tokens instead of the share and its floor."""
    budget_top_p: float | None = None
    """Of the pages within the budget load only the fewest whose estimated shares of attention, as
    `group_reduce="mass"` computes them, reach this sum (Twilight, arXiv 2502.02770). None: all of them."""
    page_size: int = 16
    """Consecutive tokens that are selected and loaded together."""
    cache_dtype: str | None = None
    """How keys and values are kept, in every layer: "int8" or "float8_e4m3fn", 8 bits with a float32 scale
    for each token and head. All attention reads them so, that within a prompt included: full attention, an
    exact cache and verified text are those of this cache. Float8 is the less exact of the two, and on a CPU
    XLA copies a layer of it in each step. None: in the model's dtype."""
    dense_layers: int = 2
    """First layers that always attend to all pages, of those with full attention. Layers with a sliding
    window do not count: they always attend to all of it."""
    sink_pages: int = 1
    """Pages at the beginning of the sequence that are always loaded, within the budget. Neither the paper
    nor Quest forces any (0)."""
    budget_covers: str = "pages"
    """What the budget limits: "pages" (the tokens that are loaded; what is read to choose them comes on top)
    or "traffic" (the bytes that Quest would read with this budget from a cache in the model's dtype: its
    tokens, and two vectors for every 16 tokens of context; statistics that take less leave room for more
    pages, as do pages in 8 bits; those that `anchor_every` and `select_every` do not read leave none)."""
    group_reduce: str = "mean"
    """How the scores of the query heads that share a KV head become one: "mean" or "max", or "mass" (each
    head's scores become attention weights over all pages, then their mean)."""
    statistics: str | None = None
    """What is kept per page: "min_max" (Quest's bounds), "mean_key" or "mean_key_int8" (in 8 bits). None: the
    first of these that the score can read, "mean_key" for a residual."""
    score: str = "bounds"
    """How "quest" and "retro" score a page: "bounds" (needs "min_max" statistics) or "mean_key" (needs
    mean keys), or "learned" (by a score that `retro-jax learn` has trained for the model); for analysis,
    "oracle" (its exact attention, which reads every key) or "random"."""
    score_channels: int = 32
    """Numbers that the score "learned" keeps of each page, in 8 bits; as many as it was trained with."""
    residual_pages: int = 0
    """Pages that are not loaded are estimated, each by its mean key and the mean value of a block of so many
    pages (needs mean keys). 0: they do not count."""
    score_seed: int = 0
    """Of the score "random"."""
    anchor_every: int = 1
    """Only every so many sparse layers, from the first on, select pages; those between load what the one
    below them has selected (LessIsMore, arXiv 2508.07101; Kascade, arXiv 2512.16391). 1: each its own."""
    select_every: int = 1
    """Pages are selected anew at every so many positions; the tokens between load what an earlier one has
    selected, and pages that have begun since, within the budget. 1: each token selects its own."""
    evict: str | None = None
    """A method whose rule takes pages away from "quest" and "retro" for good: "tova" or "h2o"."""
    cache_tokens: int | None = None
    """Tokens that `evict` leaves in each sparse layer; at least the budget."""
    observation: int = 32
    """Last queries of the prompt by whose attention "snapkv" compresses it."""
    overwrite: bool = True
    """Write the corrected keys and values of past queries over the stale ones. Without it RetroAttention
    generates what Quest generates."""
    revised_layers: float = 1.0
    """Share of the sparse layers, from the lowest on, whose window revises past queries. Those above serve
    the newest query alone and keep what they have written. With 0.5 a window of 4 was worse than Quest
    nowhere that was measured, unlike with 1.0, the paper's."""
    rectify_every: int | None = None
    """After so many decoded tokens one dense pass over them writes their keys and values anew, as full
    attention would have (ReSA, arXiv 2506.04108). It reads the whole cache. 1: an exact cache behind every
    query. None: never."""
    prefill_chunk: int = 256
    """Prompt tokens that are processed at once."""
    implementation: str | None = None
    """Kernels: None picks the best that this device has, "xla" the reference."""

    @property
    def least_tokens(self) -> int:
        """Tokens that a step may load at any context."""
        return self.budget_floor if self.budget_tokens is None else self.budget_tokens


@dataclass(frozen=True)
class SamplingFields:
    """How the next token is chosen, unchecked."""

    temperature: float = 0.0
    """0 takes the most likely token; above, logits are divided by it."""
    top_k: int | None = None
    """Sample among so many most likely tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of the random draws; each sequence of a batch has its own stream."""
