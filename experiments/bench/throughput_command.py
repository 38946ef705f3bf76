"""The flags of `bench throughput`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.io.flags import Command, NoPrefix, common_flags

CommonFlags = common_flags("method")


@dataclass(kw_only=True)
class BenchThroughputFlags(Command):
    """Measure tokens per second over many prompts: fixed batches beside continuous batching.

    A fixed batch waits for its longest reply. Greedy; lengths of prompts and of replies lie evenly on a
    logarithmic scale, in a random order, and are the same in all runs. A short run before each compiles its
    programs.
    """

    text: tuple[Path, ...] = ()
    """UTF-8 text files that prompts are cut from. None: random tokens."""
    prompts: int = 20
    """How many."""
    prompt_tokens: tuple[int, int] = (32, 128)
    """Least and most tokens of a prompt."""
    reply_tokens: tuple[int, int] = (16, 1024)
    """Least and most tokens of a reply."""
    slots: tuple[int, ...] = (8,)
    """Sequences that are decoded together, in batches of that size or one replaced by the next."""
    methods: tuple[str, ...] = ("full",)
    """Any of full, quest, retro, streaming, tova, h2o, snapkv, expected."""
    presets: tuple[str, ...] = ()
    """Presets beside them: any of quest, paper, mean-key."""
    steps_per_call: int = 16
    """Decode steps of one compiled call."""
    seed: int = 0
    """Of lengths, order, and random tokens."""
    out: Path | None = None
    """Folder for table and JSON; it must not exist."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)
