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

    Beside them stands what the bytes of weights and cache would allow if every slot were always in use, and
    the cache's share of these bytes: while it is small, more slots give more tokens, as all of them read the
    same weights. Of a mixture of experts the experts are left out.
    """

    text: tuple[Path, ...] = ()
    """UTF-8 text files that prompts are cut from. None: random tokens."""
    prompts: int = 20
    """How many."""
    prompt_tokens: tuple[int, int] = (32, 128)
    """Least and most tokens of a prompt."""
    contexts: tuple[int, ...] = ()
    """Tokens of all prompts, each number measured by itself, in place of --prompt-tokens."""
    reply_tokens: tuple[int, int] = (16, 1024)
    """Least and most tokens of a reply."""
    slots: tuple[int, ...] = (8,)
    """Sequences that are decoded together, in batches of that size or one replaced by the next."""
    methods: tuple[str, ...] = ("full",)
    """Any of full, quest, retro, streaming, tova, h2o, snapkv, expected."""
    presets: tuple[str, ...] = ()
    """Presets beside them: any of quest, paper, mean-key."""
    verify: int | None = None
    """Beside what selects pages, its verified decoding by so many drafts at most, in fixed batches."""
    steps_per_call: int = 16
    """Decode steps of one compiled call."""
    ceiling_bytes: int = 1 << 28
    """Size of the array whose reading gives the bandwidth that the limit is told by."""
    seed: int = 0
    """Of lengths, order, and random tokens."""
    out: Path | None = None
    """Folder for table, picture and JSON; it must not exist."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)
