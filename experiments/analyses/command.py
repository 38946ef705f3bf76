"""The flags of `overlap` and `distances`."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.estimates import BLOCK
from retro_jax.experiments.io.flags import NoPrefix, TextCommand, common_flags
from retro_jax.presets import PRESETS

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

EVICTION = ("evict", "cache_tokens", "observation")
SELECTION = ("budget_top_p", "anchor_every", "select_every")
CommonFlags = common_flags("method", "window", "overwrite", *EVICTION, *SELECTION)
VARIED = tuple({"window", "budget", "budget_tokens"}.union(*PRESETS.values()))
"""Fields in which the cases of `distances` differ."""
CaseFlags = common_flags(*VARIED, *EVICTION, *SELECTION, "score_seed")


@dataclass(kw_only=True)
class OverlapFlags(TextCommand):
    """Measure how many of a query's pages earlier queries had loaded, and how many they had only just missed.

    Decodes along the text with Quest. Pages that an earlier query had next in rank are what retrospection
    adds to it.
    """

    distances: int = 8
    """Earlier queries that each one is compared with."""
    out: Path | None = None
    """Folder for table, JSON and picture; it must not exist."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)


@dataclass(kw_only=True)
class DistancesFlags(TextCommand):
    """Measure how far keys, values and attention outputs are from full attention's, by layer and age.

    Decodes along the texts by presets, with and without a window, beside full attention's own pass over them.
    Each case is saved when it is finished: the same command continues where it was stopped, and further
    values add cases. Rounding is a distance too: use --dtype float32, and on a GPU the environment variable
    JAX_DEFAULT_MATMUL_PRECISION=highest.
    """

    presets: tuple[Literal[tuple(PRESETS)], ...] = ("quest", "mean-key")
    """What selects and loads pages."""
    windows: tuple[int, ...] = (1, 4)
    """Queries that a step serves; 1 revises none."""
    budgets: tuple[float, ...] = (256,)
    """What a step may load per layer and KV head: up to 1 a share of the context, above it tokens."""
    sink_pages: tuple[int, ...] = ()
    """Pages at the beginning that are always loaded; none given: as many as the preset has."""
    ages: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
    """Steps since a token was written at which its keys and values are compared."""
    out: Path
    """Folder for the results."""
    config: Annotated[CaseFlags, NoPrefix] = field(default_factory=CaseFlags)

    def cases(self) -> "dict[str, DecodeConfig]":
        """Returns what decodes, by the name of its file.

        Raises:
          ValueError: a value is not possible, or ages do not ascend from 0 beyond every window.
        """
        for flag in ("presets", "windows", "budgets", "ages"):
            if not getattr(self, flag):
                raise ValueError(f"--{flag} needs at least one value")
        if self.ages[0] != 0 or any(a >= b for a, b in itertools.pairwise(self.ages)):
            raise ValueError(
                f"--ages are {' '.join(map(str, self.ages))}; they must ascend from 0, the token just written"
            )
        if self.ages[-1] < max(self.windows) - 1:
            raise ValueError(
                f"--ages end at {self.ages[-1]}, before a window of {max(self.windows)} has passed a token; "
                f"add {max(self.windows) - 1} or a higher one"
            )
        found = {}
        for preset, budget, window in itertools.product(self.presets, self.budgets, self.windows):
            for sinks in self.sink_pages or (PRESETS[preset]["sink_pages"],):
                fields = {**PRESETS[preset], "sink_pages": sinks, "window": window, **budget_fields(budget)}
                if window > 1:
                    fields["method"] = "retro"
                found[f"{preset}-w{window}-s{sinks}-b{budget:g}"] = self.config.config(**fields)
        return found

    def check_length(self, tokens: int) -> None:
        """Raises ValueError where fewer tokens pass all ages than two blocks have, which errors come from."""
        passed = tokens - self.prompt_tokens - self.ages[-1]
        if passed < 2 * BLOCK:
            raise ValueError(
                f"{tokens} tokens less a prompt of {self.prompt_tokens} and the highest age, {self.ages[-1]},"
                f" are below {2 * BLOCK}, two blocks of {BLOCK} tokens, which errors come from; raise "
                "--tokens or lower --ages"
            )
