"""How to decode: the method and its budget, as one static, hashable value.

Here are the ranges of fields and what only some kinds of methods take; what one method cannot do, it says
itself (`Method.check`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pallas_kernels import CODES, GROUP_REDUCE, IMPLEMENTATIONS, SCORES, STATISTICS, pages_for
from retro_jax.fields import DecodeFields, check_seed, check_types
from retro_jax.methods import METHODS, Eviction, Method
from retro_jax.models.names import nearest
from retro_jax.presets import preset_fields
from retro_jax.selectors import LEARNED, SELECTORS

MEAN_KEYS = SCORES["mean_key"].statistics
"""Statistics that a residual can estimate pages by."""

EXCLUDED = {
    "budget_top_p": {"evict": "takes away pages that shares are estimated of"},
    "anchor_every": {
        "evict": "leaves each layer other pages",
        "residual_pages": "reads the statistics of each layer",
    },
    "select_every": {"residual_pages": "reads the statistics in each step"},
}
"""What changes how pages are selected: each with the fields that exclude it, and why."""
OF_SCORED = frozenset(
    {"evict", "cache_tokens", "residual_pages", "budget_covers", "rectify_every", *EXCLUDED}
)
"""What only methods that select pages by a score have."""
OF_WINDOWS = frozenset({"revised_layers"})
"""What only methods that revise past queries have."""


@dataclass(frozen=True)
class DecodeConfig(DecodeFields):
    """What a decode step computes. Static: pass it to `jax.jit` as a static argument.

    Its fields and their defaults are those of `DecodeFields`.

    Raises:
      ValueError: a field is out of its range, or two fields contradict each other.
      TypeError: a field is of another type than it says.
    """

    def __post_init__(self):
        check_types(self, DecodeFields)
        check_seed(score_seed=self.score_seed)
        _check_known("method", self.method, METHODS)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is below 1; a window of 1 serves the newest query only")
        if self.window not in (None, 1) and not self.attention.revises:
            why = ""
            if self.attention.eviction:
                why = " (every page that it still has was there for the earlier queries too)"
            raise ValueError(
                f"method {self.method!r} serves only the newest query, window {self.window} was asked for"
                f"{why}; use method {_either(m for m in METHODS.values() if m.revises)} or window None"
            )
        lowest = {"page_size": 1, "prefill_chunk": 1, "observation": 1, "anchor_every": 1, "select_every": 1}
        lowest |= {"dense_layers": 0, "sink_pages": 0, "residual_pages": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} {getattr(self, name)} is below {low}")
        self._check_revision()
        if self.rectify_every is not None:
            self._check_rectification()
        self._check_parts()
        self._check_budget()
        if self.evict is not None:
            self._check_eviction()
        self.attention.check(self)

    def _check_parts(self):
        _check_known("score", self.score, SELECTORS)
        _check_known("statistics", self.statistics, STATISTICS, optional=True)
        _check_known("group_reduce", self.group_reduce, GROUP_REDUCE)
        _check_known("cache_dtype", self.cache_dtype, CODES, optional=True)
        _check_known("implementation", self.implementation, IMPLEMENTATIONS, optional=True)
        if self.score_channels < 2 or self.score_channels % 2:
            raise ValueError(
                f"score_channels {self.score_channels} is not possible; use an even number, 2 or more"
            )
        readable = SELECTORS[self.score].statistics
        if readable and self.statistics not in (None, *readable):
            raise ValueError(
                f"score {self.score!r} reads {' or '.join(readable)} statistics, not {self.statistics!r}; "
                "use statistics=None"
            )
        if self.residual_pages:
            self._check_residual()
        self._check_selection()

    def _check_revision(self):
        layers = self.revised_layers
        if not 0.0 < layers <= 1.0:
            raise ValueError(
                f"revised_layers {layers} is not within 0..1, a share of the sparse layers above 0; use a "
                "window of 1 to revise none"
            )
        if layers < 1.0 and self.slots == 1:
            raise ValueError(
                f"revised_layers {layers} was asked for with method {self.method!r} and a window of 1, which "
                "revises nothing; use a wider window"
            )

    def _check_rectification(self):
        if self.rectify_every < 1:
            raise ValueError(f"rectify_every {self.rectify_every} is below 1; use None to never rectify")
        if self.attention.dense or self.attention.eviction or self.evict is not None:
            why = "evicts pages that it would need"
            if self.attention.dense:
                why = "writes an exact cache by itself"
            raise ValueError(
                f"rectify_every {self.rectify_every} was asked for with method {self.method!r}, evict "
                f"{self.evict!r}, which {why}; use method {_scored()} without evict"
            )

    def _check_residual(self):
        name = f"residual_pages {self.residual_pages}"
        if not self.attention.scored:
            raise ValueError(
                f"{name} was asked for with method {self.method!r}, which selects no pages by a score; use "
                f"method {_scored()}"
            )
        if self.evict is not None:
            raise ValueError(
                f"{name} was asked for with evict {self.evict!r}, whose pages are gone for good; use only one"
            )
        if self.kept_statistics not in MEAN_KEYS or self.score == LEARNED:
            raise ValueError(
                f"{name} estimates pages by their mean keys, score {self.score!r} keeps "
                f"{self.kept_statistics!r} statistics; use score 'mean_key'"
            )

    def _check_selection(self):
        p = self.budget_top_p
        if p is not None and not 0.0 < p < 1.0:
            raise ValueError(
                f"budget_top_p {p} is not between 0 and 1; use None to load all of the budget's pages"
            )
        if p is not None and not SELECTORS[self.score].shares:
            raise ValueError(
                f"budget_top_p {p} needs estimates of attention, score {self.score!r} gives none; use another"
            )
        for name, others in EXCLUDED.items():
            value = f"{name} {getattr(self, name)}"
            if getattr(self, name) == getattr(DecodeFields, name):
                continue
            if not self.attention.scored:
                raise ValueError(
                    f"{value} was asked for with method {self.method!r}, which selects no pages by a score; "
                    f"use method {_scored()}"
                )
            for other, why in others.items():
                if getattr(self, other) != getattr(DecodeFields, other):
                    raise ValueError(
                        f"{value} was asked for with {other} {getattr(self, other)!r}, which {why}; use only "
                        "one"
                    )

    def _check_budget(self):
        if self.budget_covers not in ("pages", "traffic"):
            raise ValueError(f"budget_covers {self.budget_covers!r} is unknown; use 'pages' or 'traffic'")
        if self.budget_covers == "traffic" and not (self.attention.scored and self.evict is None):
            raise ValueError(
                f"budget_covers 'traffic' was asked for with method {self.method!r}, evict {self.evict!r}, "
                f"which evicts or loads all pages; use method {_scored()} without evict"
            )
        if not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget {self.budget} is not a share in (0, 1]; use budget_tokens for tokens")
        name = "budget_floor" if self.budget_tokens is None else "budget_tokens"
        tokens, forced = self.least_tokens, 1 + self.sink_pages
        if pages_for(tokens, self.page_size) < forced:
            raise ValueError(
                f"{name} {tokens} is below the {forced} pages of {self.page_size} tokens that are always "
                f"loaded (the newest and sink_pages={self.sink_pages}); it must exceed "
                f"{(forced - 1) * self.page_size}"
            )

    def _check_eviction(self):
        if not self.attention.scored:
            raise ValueError(
                f"evict {self.evict!r} was asked for with method {self.method!r}, which selects no pages; "
                f"use method {_scored()}"
            )
        rules = [name for name, method in METHODS.items() if method.eviction and method.eviction.joins]
        if self.evict not in rules:
            raise ValueError(f"evict {self.evict!r} is not possible; use one of {', '.join(rules)}")
        name = "budget_floor" if self.budget_tokens is None else "budget_tokens"
        if self.cache_tokens is None or self.cache_tokens < self.least_tokens:
            raise ValueError(
                f"cache_tokens {self.cache_tokens} is below {name} {self.least_tokens}; set how many "
                f"tokens evict={self.evict!r} leaves"
            )

    @property
    def selects_by_learned(self) -> bool:
        """Whether pages are selected by a learned score, which the model must have then."""
        return self.score == LEARNED and self.attention.scored

    @property
    def attention(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def eviction(self) -> Eviction | None:
        """The rule by which pages leave the cache."""
        return METHODS[self.evict or self.method].eviction

    @property
    def kept_statistics(self) -> str | None:
        """The kind of page statistic that the cache must keep; None if nothing reads one."""
        if not self.attention.scored:
            return None
        readable = SELECTORS[self.score].statistics or (MEAN_KEYS if self.residual_pages else ())
        return (self.statistics or readable[0]) if readable else None

    @property
    def scored_vectors(self) -> int:
        """Vectors of head_dim that are read of each page to score it, beside its statistics."""
        return SELECTORS[self.score].vectors(self.page_size) if self.attention.scored else 0

    @property
    def slots(self) -> int:
        """W, the queries that one step serves."""
        return self.attention.default_window if self.window is None else self.window

    def num_pages(self, capacity: int) -> int:
        """P, the pages of a cache for `capacity` tokens: a multiple of 8, as kernels' copies want it."""
        return -(-pages_for(capacity, self.page_size) // 8) * 8

    @property
    def left_pages(self) -> int | None:
        """Pages that `evict` leaves; None: it is not asked for."""
        return None if self.evict is None else pages_for(self.cache_tokens, self.page_size)


def absent_fields(method: str, window: int | None = None) -> frozenset[str]:
    """Returns the fields of `DecodeConfig` that a method does not have: only their defaults are taken.

    Args:
      method: its name; of one that is unknown, none is absent.
      window: of its queries; None: its own.
    """
    if method not in METHODS:
        return frozenset()
    known, absent = METHODS[method], frozenset()
    if not known.scored:
        absent |= OF_SCORED
    if not known.revises:
        absent |= {"window"}
    if not known.revises or (window or known.default_window) == 1:
        absent |= OF_WINDOWS
    return absent


def _check_known(field: str, value: str | None, names: Iterable[str], optional: bool = False) -> None:
    if value not in names and not (optional and value is None):
        are, none = ("are" if field == "statistics" else "is"), ("None or " if optional else "")
        raise ValueError(
            f"{field} {value!r} {are} unknown{nearest(value, names)}; use {none}one of {', '.join(names)}"
        )


def _either(methods: Iterable[Method]) -> str:
    return " or ".join(repr(method.name) for method in methods)


def _scored() -> str:
    return _either(method for method in METHODS.values() if method.scored)


def preset(name: str = "mean-key", **changes: object) -> DecodeConfig:
    """A named configuration.

    Args:
      name: as for `preset_fields`.
      **changes: fields of `DecodeConfig` to set otherwise.

    Raises:
      ValueError: the name is unknown, or the configuration is not possible.
      TypeError: a change is no field of `DecodeConfig`.
    """
    return DecodeConfig(**(dict(preset_fields(name)) | changes))
