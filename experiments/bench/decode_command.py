"""The flags of `bench decode`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from retro_jax.experiments.io.flags import NoPrefix, OverDevices, common_flags

CommonFlags = common_flags("method", "window")


@dataclass(kw_only=True)
class BenchDecodeFlags(OverDevices):
    """Measure the speed of decoding: methods take turns in one run, for each length of the context.

    Greedy, from a context of random tokens. Times are medians of single steps, ratios medians over rounds.
    On a GPU or TPU the profiler tells of the steps in one call how long the device is busy, and its launches.
    """

    contexts: tuple[int, ...] = (4096,)
    """Tokens in the cache when decoding begins."""
    batch: int = 1
    """Sequences that are decoded together."""
    methods: tuple[str, ...] = ("full", "quest", "retro")
    """Any of full, quest, retro, streaming, tova, h2o, snapkv, expected."""
    presets: tuple[str, ...] = ()
    """Presets beside them: any of quest, paper, mean-key, at the same budget."""
    windows: tuple[int, ...] = (4,)
    """Window sizes of RetroAttention."""
    prefill: bool = True
    """Compute the keys and values of the context. Without it they are those of random hidden states, which
    are there at once, however long the context; steps take as long."""
    steps: int = 16
    """Decode steps of one turn."""
    rounds: int = 6
    """Turns of each contestant, after three steps to warm up, which compile and are not timed."""
    together: int | None = None
    """Methods whose caches are held at once, and which take turns with each other; None: all of them. Where
    those do not fit the memory, so many are measured after so many: what else the machine does may then meet
    some of them only. --reference and --torch take turns with the first."""
    reference: Path | None = None
    """A Python interpreter with torch and transformers, which then decodes the same weights in turn. Where
    other programs use the CPU, set OMP_WAIT_POLICY=PASSIVE: torch's threads wait busily for each other, which
    multiplies its times then."""
    torch: Path | None = None
    """A Python interpreter with torch, whose compiled dense step of the same sizes, with random weights, then
    takes turns too. On a GPU JAX must leave it room: XLA_PYTHON_CLIENT_MEM_FRACTION=0.5."""
    scan: bool = True
    """Also time as many steps in one call, as generate takes them; it compiles a second program."""
    ceiling_bytes: int = 1 << 28
    """Size of the array whose reading gives the bandwidth that the limit is told by."""
    seed: int = 0
    """Of the random context."""
    out: Path | None = None
    """JSON file for the results, beside which a picture with the same name goes; neither may exist."""
    config: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)
