"""The flags of `bench verify`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.io.flags import Command, Flag, NoPrefix, common_flags

CommonFlags = common_flags("method", "window", "budget", "budget_tokens")


@dataclass(kw_only=True)
class BenchVerifyFlags(Command):
    """Measure verified decoding against full attention in the library's own loop, and predict it.

    Greedy, from a context that all sequences share but for their last tokens. Measured are the tokens per
    second of both, and what a dense step, a draft step and a check take by themselves, of which follows what
    any acceptance would give.
    """

    text: tuple[Path, ...] = ()
    """UTF-8 text files, which are joined. None: random tokens, whose acceptance says nothing of a text's, and
    with --predict none at all."""
    batch: int = 1
    """Sequences that are decoded together."""
    context: int = 4096
    """Tokens that all sequences begin with: read once, and copied for each."""
    own_tokens: int = 64
    """Tokens behind them that each sequence has of its own."""
    new_tokens: int = 96
    """Tokens that each sequence decodes, at least."""
    methods: tuple[str, ...] = ("quest",)
    """What drafts: any of quest, retro."""
    presets: tuple[str, ...] = ()
    """Presets beside them: any of quest, paper, mean-key."""
    budgets: tuple[float, ...] = (0.05,)
    """What a draft step may load per layer and KV head: up to 1 a share of the context, above it tokens."""
    drafts: tuple[int, ...] = (4, 8)
    """Drafts of a check."""
    adapt: Flag[bool] = False
    """Also draft as many as the acceptance so far makes pay, up to the most of --drafts."""
    predict: Flag[bool] = False
    """Decode nothing: measure the parts only, and predict."""
    acceptances: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
    """Probabilities that a draft is accepted where those before it were, to predict for."""
    calls: int = 5
    """Calls of each part, of which the median is taken."""
    seed: int = 0
    """Of random tokens."""
    out: Path | None = None
    """Folder for table and JSON; it must not exist."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)
