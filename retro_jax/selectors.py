"""What pages can be selected by: the names of `DecodeConfig.score`.

Scores of page statistics are `pallas_kernels`', with kernels; the learned one runs as one of them. The others
are for analysis, in plain `jnp`: how good a selection could be ("oracle"), and what selecting at all is worth
("random").
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import SCORES, attention_mass, page_scores
from retro_jax.cache import LayerState
from retro_jax.rules import Query, Rules

LEARNED = "learned"
"""The score whose maps of queries and keys are weights of the model's layers (`retro_jax.learned`)."""


@dataclass(frozen=True)
class Selector:
    """A way to score pages.

    Attributes:
      statistics: the kinds of page statistic that it can read; empty if it reads none.
      scores: (rules, layer state, newest query, pages that may be chosen[B, K, P]) -> scores[B, K, P]; those
        of other pages do not matter.
      vectors: page size -> vectors of head_dim that it reads of each page beside its statistics.
      by: the name in `pallas_kernels.SCORES` whose kernels compute it; None: none do.
      shares: whether with `group_reduce="mass"` its scores are shares of attention, by which `budget_top_p`
        counts; those of all pages that may be chosen then sum to 1.
    """

    statistics: tuple[str, ...]
    scores: Callable[[Rules, LayerState, Query, Bool[Array, "B K P"]], Float[Array, "B K P"]]
    vectors: Callable[[int], int]
    by: str | None = None
    shares: bool = True


def _by_statistics(score: str) -> Selector:
    scores = functools.partial(_statistics_scores, score)
    return Selector(SCORES[score].statistics, scores, lambda page_size: 0, by=score)


def _statistics_scores(score, rules, layer, query, allowed):
    return page_scores(
        query.scored,
        layer.statistics,
        query.positions,
        page_size=rules.page_size,
        score=score,
        group_reduce=rules.group_reduce,
        implementation=rules.implementation,
    )


def _oracle(rules, layer, query, allowed):
    """The attention that the newest query would give to each page if it saw all of them."""
    return attention_mass(
        query.q[:, None],
        layer.pages,
        query.positions[:, None],
        allowed,
        query.sinks,
        group_reduce=rules.group_reduce,
        implementation=rules.implementation,
    )


def _random(rules, layer, query, allowed):
    """Uniform numbers that depend on the seed, layer, position, KV head and page, and on nothing else."""
    K, P = allowed.shape[1:]

    def number(position, head, page):
        key = jax.random.key(rules.score_seed, impl="threefry2x32")
        for part in (query.layer, position, head, page):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)

    return jnp.vectorize(number)(query.positions[:, None, None], jnp.arange(K)[:, None], jnp.arange(P))


_OTHERS = {
    "oracle": Selector(statistics=(), scores=_oracle, vectors=lambda page_size: page_size),
    "random": Selector(statistics=(), scores=_random, vectors=lambda page_size: 0, shares=False),
}


class _Selectors(Mapping):
    """Those of page statistics, registered ones included, and the others."""

    def __getitem__(self, score):
        if score == LEARNED:  # summaries are mean keys with other numbers
            return replace(_by_statistics("mean_key"), statistics=("mean_key_int8",))
        return _OTHERS[score] if score in _OTHERS else _by_statistics(score)

    def __iter__(self):
        return iter((*SCORES, LEARNED, *_OTHERS))

    def __len__(self):
        return len(SCORES) + 1 + len(_OTHERS)


SELECTORS: Mapping[str, Selector] = _Selectors()
