"""What a comparison runs: values of several settings, in every combination."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from retro_jax.experiments.compare.ladder import ladder
from retro_jax.experiments.io.budgets import budget_fields, budget_value
from retro_jax.experiments.io.flags import Flag
from retro_jax.fields import DecodeFields
from retro_jax.presets import preset_fields

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

DEFAULTS = DecodeFields()
NAMES = {
    "full": "full",
    "quest": "Quest",
    "retro": "Retro",
    "streaming": "StreamingLLM",
    "tova": "TOVA",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "expected": "Expected",
}


@dataclass(frozen=True)
class Axis:
    """A setting whose values one comparison runs side by side.

    Attributes:
      flag: the field of `Sweep` that lists its values; "": only presets set others than the default.
      field: of `DecodeConfig`; for the budget, which is either of two, the one that shares it.
      prefix: what comes before a value in the name of a run.
      column: the header over its values in a table; None: a value other than the default belongs to the
        method's name, in `words`.
      words: a value -> words.
      scored: whether only Quest and RetroAttention have it.
      joins: whether its values come beside the default, and presets run with them too.
      read: a configuration -> the value; None: the field.
      write: a value -> the fields of `DecodeConfig` that it sets; None: the field.
    """

    flag: str
    field: str
    prefix: str = ""
    column: str | None = None
    words: Callable[[object], str] = str
    scored: bool = False
    joins: bool = False
    read: Callable[[DecodeFields], object] | None = None
    write: Callable[[object], dict] | None = None

    def value(self, config: DecodeFields) -> object:
        """Its value in a configuration."""
        return self.read(config) if self.read else getattr(config, self.field)

    def fields(self, value: object) -> dict:
        """The fields of `DecodeConfig` that a value sets."""
        return self.write(value) if self.write else {self.field: value}

    @property
    def default(self) -> object:
        """The value of `DecodeConfig()`, which goes without saying in the name of a run."""
        return self.value(DEFAULTS)

    def rank(self, config: "DecodeConfig") -> tuple:
        """What runs are sorted by: numbers as such, shares after tokens; else the default first."""
        value = self.value(config)
        if value is None:  # before every number, and as a default before every word
            return value != self.default, float("-inf")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return (value != self.default if self.joins else isinstance(value, float)), value
        return value != self.default, str(value)


def _evicts(rule: str) -> str:
    from retro_jax.methods import METHODS

    return f"{METHODS[rule].title} evicts"


def _top_p(share: float) -> str:
    return f"top-p {share:g}"


def _anchored(every: int) -> str:
    return f"anchors every {every} layers"


def _reused(every: int) -> str:
    return f"selected every {every} tokens"


def _partly_revised(share: float) -> str:
    return f"the lower {share:g} of the layers revised"


def _rectified(every: int) -> str:
    return "exact cache" if every == 1 else f"rectified every {every} tokens"


def _cached(dtype: str) -> str:
    return f"{dtype} cache"


AXES = (
    Axis("budgets", "budget", "b", "budget", read=budget_value, write=budget_fields),
    Axis("page_sizes", "page_size", "p", "page size"),
    Axis("sink_pages", "sink_pages", "sinks", "sink pages"),
    Axis("group_reduces", "group_reduce", column="group reduce"),
    Axis("cache_dtype", "cache_dtype", "cache_", words=_cached, joins=True),
    Axis("evict", "evict", "evict_", words=_evicts, scored=True),
    Axis("scores", "score", scored=True),
    Axis("", "statistics", scored=True),
    Axis("", "residual_pages", "residual", words=lambda pages: f"residual of {pages} pages", scored=True),
    Axis("", "budget_covers", scored=True),
    Axis("top_p", "budget_top_p", "top_p", words=_top_p, scored=True, joins=True),
    Axis("anchor_every", "anchor_every", "anchors", words=_anchored, scored=True, joins=True),
    Axis("select_every", "select_every", "reuse", words=_reused, scored=True, joins=True),
    Axis("revised_layers", "revised_layers", "revised", words=_partly_revised, scored=True, joins=True),
    Axis("rectify", "rectify_every", "f", words=_rectified, scored=True, joins=True),
)
"""A further one is a line here and a field of `Sweep`, unless presets alone set it."""
VARIED = ("method", "window", "overwrite", *(name for axis in AXES for name in axis.fields(axis.default)))
"""The fields of `DecodeConfig` in which the runs of one comparison can differ."""


@dataclass(frozen=True)
class Sweep:
    """What runs beside full attention: every combination of the values below.

    More values add runs to a folder that has others already.
    """

    windows: tuple[int, ...] = (4,)
    """Window sizes of RetroAttention; 1 is Quest, which always runs."""
    budgets: tuple[float, ...] = (0.15,)
    """What a step may load per layer and KV head: up to 1 a share of the context, above it tokens."""
    page_sizes: tuple[int, ...] = (16,)
    """Tokens of a page."""
    sink_pages: tuple[int, ...] = (1,)
    """Numbers of first pages that are always loaded."""
    group_reduces: tuple[str, ...] = ("mean",)
    """How the scores of the query heads that share a KV head become one: mean, max."""
    scores: tuple[str, ...] = ("bounds",)
    """What Quest and RetroAttention select by: bounds, mean_key, learned, oracle, random."""
    evict: tuple[str | None, ...] = ()
    """Eviction rules, tova or h2o, with which Quest and RetroAttention also run; they need --cache-tokens.
    None, without a rule, runs anyway."""
    top_p: tuple[float, ...] = ()
    """Shares of attention that the pages within the budget have to reach: Quest, RetroAttention and presets
    also run with the fewest pages that do."""
    anchor_every: tuple[int, ...] = ()
    """Of how many sparse layers one selects for all: Quest, RetroAttention and presets also run so."""
    select_every: tuple[int, ...] = ()
    """At every how many positions pages are selected anew, and not by each token: Quest, RetroAttention and
    presets also run so."""
    revised_layers: tuple[float, ...] = ()
    """Shares of the sparse layers, the lowest ones, to which windows are confined: RetroAttention and presets
    that revise also run so."""
    rectify: tuple[int, ...] = ()
    """After how many tokens a dense pass rewrites their keys and values exactly: Quest, RetroAttention and
    presets also run so. 1: an exact cache, so that only what the newest query misses is left."""
    cache_dtype: tuple[str | None, ...] = ()
    """How keys and values are kept, int8 or float8_e4m3fn: everything, full attention included, also runs so.
    None, the model's dtype, runs anyway: excess is over full attention with it."""
    methods: tuple[str, ...] = ()
    """Further methods: streaming, tova, h2o, snapkv, expected."""
    presets: tuple[str, ...] = ()
    """Presets of the library (quest, paper, mean-key) at every budget; those that revise past queries with
    every window."""
    ladder: Flag[bool] = False
    """Also run what leads from Quest to preset mean-key, one part after another, at every budget."""
    no_overwrite: Flag[bool] = False
    """Also run the widest window without overwriting keys and values, which must give Quest's numbers."""

    def configurations(self, common: "DecodeConfig") -> "list[DecodeConfig]":
        """Returns the configurations to run: full; then, for each combination, Quest, Retro, other methods.

        Args:
          common: the fields that all share; those in `VARIED` are replaced.

        Raises:
          ValueError: a value is not possible, or a list is empty.
        """
        self._check()
        plain = {name: getattr(DecodeFields, name) for name in VARIED}
        # Full attention has no sink pages to choose; 0 is within any budget.
        full = replace(common, **plain | {"method": "full", "sink_pages": 0})
        wider = sorted(set(self.windows) - {1})
        found = [full, *(replace(full, cache_dtype=dtype) for dtype in self.cache_dtype)]
        joining = [axis for axis in AXES if axis.joins]
        rest = [axis for axis in joining if axis.scored and axis.field != "revised_layers"]
        of_all, of_scored = ([axis for axis in AXES if axis.scored == scored] for scored in (False, True))
        for shared in self._combinations(of_all):
            for own in self._combinations(of_scored):
                revised = own.pop("revised_layers")
                if own["evict"] and any(own[axis.field] != axis.default for axis in rest):
                    continue  # what was evicted can be neither rectified nor taken over
                quest = replace(full, method="quest", **shared | own)
                everywhere = revised == DecodeFields.revised_layers
                found += [quest] * everywhere  # without a window there is nothing to confine
                found += [
                    replace(quest, method="retro", window=window, revised_layers=revised) for window in wider
                ]
                if self.no_overwrite and everywhere:
                    widest = max(wider, default=4)
                    found.append(replace(quest, method="retro", window=widest, overwrite=False))
            found += [replace(full, method=name, **shared) for name in self.methods]
        for budget in map(budget_fields, self.budgets):
            if self.ladder:
                found += ladder(full, budget)
            for name in self.presets:
                chosen = replace(full, **plain | dict(preset_fields(name)) | budget)
                revises = chosen.attention.revises
                for joined in self._combinations(joining):
                    if joined["revised_layers"] != DecodeFields.revised_layers and not revises:
                        continue
                    for window in wider if revises else [chosen.window]:
                        found.append(replace(chosen, window=window, **joined))
        return list(dict.fromkeys(found))

    def _combinations(self, axes: Sequence[Axis]) -> Iterator[dict]:
        """The fields of every combination of values of some axes."""
        for values in itertools.product(*map(self._values, axes)):
            combined = {}
            for axis, value in zip(axes, values, strict=True):
                combined |= axis.fields(value)
            yield combined

    def _values(self, axis: Axis) -> tuple:
        values = getattr(self, axis.flag) if axis.flag else (axis.default,)
        return (axis.default, *values) if axis.joins or axis.default is None else values

    def _check(self):
        from retro_jax.methods import METHODS
        from retro_jax.models.names import nearest

        for field in fields(self):
            if field.default and not getattr(self, field.name):
                raise ValueError(f"--{field.name.replace('_', '-')} needs at least one value")
        others = [name for name, method in METHODS.items() if not method.dense and not method.scored]
        for name in self.methods:
            if name not in others:
                raise ValueError(
                    f"--methods has {name!r}{nearest(name, others)}; use {', '.join(others)} (full "
                    "attention, Quest and RetroAttention run anyway)"
                )


def quest_of(config: "DecodeConfig") -> "DecodeConfig":
    """Returns Quest with the same budget, page size and other settings, but for those that join others."""
    joined = {axis.field: axis.default for axis in AXES if axis.joins}
    return replace(config, method="quest", window=None, overwrite=True, **joined)


def run_name(config: "DecodeConfig") -> str:
    """Returns the name of a run: its method, and what differs from the defaults."""
    parts = [config.method, "" if config.window is None else f"w{config.window}"]
    axes = [axis for axis in AXES if config.method != "full" or axis.field == "cache_dtype"]
    parts += [f"{axis.prefix}{value}" for axis in axes if (value := axis.value(config)) != axis.default]
    return "-".join(filter(None, [*parts, "" if config.overwrite else "no_overwrite"]))


def order(config: "DecodeConfig") -> tuple:
    """Returns what runs are sorted by: full first; the settings; Quest and RetroAttention before others."""
    shared = [axis.rank(config) for axis in AXES if not axis.scored]
    own = [axis.rank(config) for axis in AXES if axis.scored]
    last = not config.overwrite, config.slots, config.method
    return config.method != "full", *shared, not config.attention.scored, *own, *last


def columns(configs: "Sequence[DecodeConfig]") -> list[Axis]:
    """Returns the settings that have a column and differ between these sparse configurations."""
    sparse = [config for config in configs if config.method != "full"]
    return [axis for axis in AXES if axis.column and len({axis.value(config) for config in sparse}) > 1]


def constants(configs: "Sequence[DecodeConfig]") -> dict[str, object]:
    """Returns the settings that would have a column, and are the same in all sparse configurations."""
    sparse = [config for config in configs if config.method != "full"]
    varying = columns(sparse)
    same = [axis for axis in AXES if axis.column and axis not in varying]
    return {axis.column: axis.value(sparse[0]) for axis in same}


def label(config: "DecodeConfig") -> str:
    """Returns the method in words, with those settings that have no column; without its window."""
    told = [axis for axis in AXES if axis.column is None and axis.value(config) != axis.default]
    parts = [axis.words(axis.value(config)) for axis in told]
    about = ", ".join([*parts, *([] if config.overwrite else ["no overwriting"])])
    return config.attention.title + (f" ({about})" if about else "")


def settings(config: "DecodeConfig") -> dict[str, object]:
    """Returns what tells a run from others on a page: the method, its window, settings that have a column.

    Full attention has none but its name, and methods of one query a step have no window.
    """
    found = {"method": label(config)}
    if config.method == "full":
        return found
    if config.slots > 1:
        found["window"] = config.slots
    return found | {axis.column: axis.value(config) for axis in AXES if axis.column}
