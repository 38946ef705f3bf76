"""The flags of `run`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.io.flags import Flag, Hidden, NoPrefix, Output
from retro_jax.experiments.runs.config import RunConfig


@dataclass(kw_only=True)
class RunFlags(Output):
    """Run a named configuration; the same command continues where it was stopped, by whatever.

    Each result is on the disk as soon as its batch is finished, a generated reply as soon as itself is where
    one that ends makes room for the next. SIGTERM ends the run after the batch, or after the next reply.
    """

    config: Annotated[RunConfig, NoPrefix]
    name: Hidden[str]
    out: Path | None = None
    """Folder for the results; None: one under runs/ that is named after the configuration."""
    dry_run: Flag[bool] = False
    """Only print what would run: examples, tokens, decode steps and memory, no time; load, fetch and compile
    nothing."""
    compile: Flag[bool] = False
    """Only compile what would run, from shapes alone, for as many devices as it names (simulated ones where
    there are fewer), and print the memory that it takes; load and fetch nothing."""
    distributed: Flag[bool] = False
    """Share the work among the hosts that JAX finds (a TPU pod, SLURM, ...), each on its own devices."""
