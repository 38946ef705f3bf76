"""What a comparison runs: values of several settings, in every combination."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from retro_jax.experiments.compare.ladder import ladder
from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.flags import Flag
from retro_jax.experiments.io.settings import AXES, VARIED, Axis
from retro_jax.fields import DecodeFields
from retro_jax.presets import preset_fields

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

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
