"""The flags of `overlap`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.io.flags import NoPrefix, TextCommand, common_flags

CommonFlags = common_flags(
    "method", "window", "overwrite", "evict", "cache_tokens", "observation",
    "budget_top_p", "anchor_every", "select_every",
)  # fmt: skip


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
