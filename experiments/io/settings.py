"""The settings by which configurations are told apart, and what configurations are called by them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from retro_jax.experiments.io.budgets import budget_fields, budget_value
from retro_jax.fields import DecodeFields
from retro_jax.presets import PRESETS

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

DEFAULTS = DecodeFields()


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
_SET_BY_PRESETS = {name: getattr(DEFAULTS, name) for own in PRESETS.values() for name in own}
"""The fields that presets set, at their defaults."""
VARIED = ("method", "window", "overwrite", *(name for axis in AXES for name in axis.fields(axis.default)))
"""The fields of `DecodeConfig` in which the runs of one comparison can differ."""


def run_name(config: "DecodeConfig") -> str:
    """Returns the name of a run: its method, and what differs from the defaults."""
    parts = [config.method, "" if config.window is None else f"w{config.window}"]
    axes = [axis for axis in AXES if config.method != "full" or axis.field == "cache_dtype"]
    parts += [f"{axis.prefix}{value}" for axis in axes if (value := axis.value(config)) != axis.default]
    return "-".join(filter(None, [*parts, "" if config.overwrite else "no_overwrite"]))


def distinct_names(configs: "Sequence[DecodeConfig]", told: Collection[str] = ()) -> list[str]:
    """Returns names that tell configurations apart which are shown beside each other.

    As `run_name`, with the window in use, and a preset by its own name. Other fields follow where the sparse
    ones differ in them.

    Args:
      configs: in their order; equal ones have equal names.
      told: fields that stand elsewhere.
    """
    sparse = [config for config in configs if not config.attention.dense]
    others = [
        field.name
        for field in fields(DecodeFields)
        if field.name not in {*VARIED, *told} and len({_used(config, field.name) for config in sparse}) > 1
    ]
    names = []
    for config in configs:
        window = config.slots if config.attention.revises else None
        plain = asdict(config) | {"window": window} | {name: getattr(DEFAULTS, name) for name in told}
        found = [
            f"{name}={value}"
            for name in others * (not config.attention.dense)
            if (value := _used(config, name)) != getattr(DEFAULTS, name)
        ]
        names.append("-".join([_by_preset(DecodeFields(**plain)), *found]))
    return names


def by_distinct_name(configs: "Iterable[DecodeConfig]") -> "dict[str, DecodeConfig]":
    """Returns configurations by their `distinct_names`."""
    configs = list(configs)
    return dict(zip(distinct_names(configs), configs, strict=True))


def _used(config: "DecodeConfig", field: str) -> object:
    """A field's value; the default where another one decides."""
    if field == "budget_floor" and config.budget_tokens is not None:
        return DEFAULTS.budget_floor
    return getattr(config, field)


def _by_preset(config: DecodeFields) -> str:
    """The name of a configuration, of one with all that a preset sets by that of the preset."""
    if (preset := preset_of(config)) is None:
        return run_name(config)
    rest = run_name(DecodeFields(**asdict(config) | _SET_BY_PRESETS | {"method": config.method}))
    return f"preset {preset}{rest.removeprefix(config.method)}"


def preset_of(config: DecodeFields) -> str | None:
    """Returns the preset that a configuration has all settings of, of those that presets set; None: none."""
    for preset, own in PRESETS.items():
        if all(getattr(config, name) == value for name, value in (_SET_BY_PRESETS | dict(own)).items()):
            return preset
    return None


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


def label(config: "DecodeConfig", preset: str | None = None) -> str:
    """Returns the method in words, with those settings that have no column; without its window.

    Args:
      config: how to decode.
      preset: by which it is called in place of the method and of what presets set; None: by none.
    """
    told = [axis for axis in AXES if axis.column is None and axis.value(config) != axis.default]
    told = [axis for axis in told if preset is None or axis.field not in _SET_BY_PRESETS]
    parts = [axis.words(axis.value(config)) for axis in told]
    about = ", ".join([*parts, *([] if config.overwrite else ["no overwriting"])])
    title = config.attention.title if preset is None else f"preset {preset}"
    return title + (f" ({about})" if about else "")


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
