"""What a run is: a model, a task, and the methods that are compared on it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from retro_jax.experiments.io.budgets import budget_fields
from retro_jax.experiments.io.flags import NoPrefix, SamplingFlags, common_flags
from retro_jax.experiments.io.settings import run_name
from retro_jax.experiments.tasks import TASKS, AnyTask
from retro_jax.fields import DecodeFields
from retro_jax.presets import preset_fields

if TYPE_CHECKING:
    from retro_jax import DecodeConfig

VARIED = ("method", "window", *budget_fields(DecodeFields.budget))
"""The fields of `DecodeConfig` in which the methods of a run differ."""
CommonFlags = common_flags(*VARIED)


@dataclass(frozen=True)
class RunConfig:
    """A run, as a value: every field can be set on the command line.

    The same value gives the same examples, batches and random draws, whatever was finished before.
    """

    model: str
    """A preset ("smollm2-135m"), a Hugging Face hub id ("org/name") or folder, or a .gguf file."""
    task: tyro.conf.AvoidSubcommands[AnyTask]
    """What is asked; which kind of task it is belongs to the named config."""
    methods: tuple[str, ...] = ("full", "quest", "retro")
    """Methods to compare on the same examples."""
    presets: tuple[str, ...] = ()
    """Presets of the library (quest, paper, mean-key) to compare with them, at the same budgets."""
    windows: tuple[int, ...] = (4,)
    """Window sizes of the methods that revise past queries; each runs with every one."""
    budgets: tuple[float, ...] = (0.15,)
    """Budgets of the sparse methods: up to 1 a share of the context, above it tokens."""
    decode: Annotated[CommonFlags, NoPrefix] = field(default_factory=CommonFlags)
    sampling: Annotated[SamplingFlags, NoPrefix] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Replies to each example; more than one needs a temperature."""
    limit: int | None = None
    """Use only so many examples."""
    batch: int = 1
    """Sequences that are decoded together."""
    continuous: bool = True
    """A generated reply that ends makes room for the next one (continuous batching), for which the caches of
    a few more sequences are held. Else a batch waits for its longest reply, as with --batch 1 or replies that
    a task gives, and its steps are timed."""
    data_devices: int = 1
    """Devices of one host over which a batch is spread."""
    model_devices: int = 1
    """Devices of one host over which KV heads are spread."""
    device_gb: float | None = None
    """Memory of each device that the run is meant for, in GB; None: not told."""
    dtype: str | None = None
    """Of weights, activations and a cache without --cache-dtype, "float32" or "bfloat16"; None: the model's
    own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    learned: Path | None = None
    """Folder that `retro-jax learn` has written for this model; what --score learned selects pages by."""

    def check(self) -> None:
        """Raises ValueError if a field is out of its range, or two contradict each other."""
        from retro_jax.experiments.io.models import check_learned

        for name in ("samples", "batch", "data_devices", "model_devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} is below 1; None uses every example")
        for name in ("methods", "windows", "budgets"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 would all be the same; set a temperature"
            )
        if self.batch % self.data_devices:
            raise ValueError(f"batch {self.batch} does not divide over data_devices {self.data_devices}")
        self.sampling.sampling()
        check_learned(self.learned, list(self.configurations().values()), self.model)
        self.task.check()

    def configurations(self) -> "dict[str, DecodeConfig]":
        """How to decode, by name: full once, other methods at each budget, with each window if they revise.

        Raises:
          ValueError: a method is unknown, or a configuration is not possible.
        """
        fields = method_fields(self.methods, self.presets, self.windows, self.budgets)
        # All have one kind of cache, which names need not tell.
        found = self.decode.configs(fields).values()
        return {run_name(replace(config, cache_dtype=None)): config for config in found}

    def refills(self, forced: bool) -> bool:
        """Whether a sequence that ends makes room for the next; not where replies are given (`forced`)."""
        return self.continuous and self.batch > 1 and not forced

    def rows(self, forced: bool) -> int:
        """Rows of all states that are held at once, for replies that are given (`forced`) or generated."""
        from retro_jax.sizes import batch_rows, held_rows

        return (held_rows if self.refills(forced) else batch_rows)(self.batch, self.data_devices)

    @property
    def task_name(self) -> str:
        """The task's name in `TASKS`."""
        return next(name for name, kind in TASKS.items() if kind is type(self.task))

    def identity(self) -> dict:
        """The values that make this run another than others, for JSON.

        Where the data lies is not among them: a run keeps a digest of the examples made from it. Nor are the
        memory of the devices, and whether batching is continuous.
        """
        values = asdict(self)
        del values["learned"], values["continuous"]
        if self.learned is not None:
            from retro_jax.score_files import read_about

            values["learned"] = read_about(self.learned)["weights"]
        values["task"] = {"name": self.task_name} | values["task"]
        values["task"].pop("data", None)
        del values["device_gb"]
        for name in VARIED:
            del values["decode"][name]
        return json.loads(json.dumps(values, default=str))


def method_fields(
    methods: Sequence[str], presets: Sequence[str], windows: Sequence[int], budgets: Sequence[float]
) -> dict[str, dict]:
    """The fields of `DecodeConfig` that a run's methods set; see `RunConfig` for the arguments.

    By the labels that folders of earlier versions have: names follow from a whole configuration (`run_name`).

    Raises:
      ValueError: a method or a preset is unknown.
    """
    from retro_jax.methods import METHODS
    from retro_jax.models.names import nearest

    found = {}
    for name in methods:
        if name not in METHODS:
            raise ValueError(
                f"method {name!r} is unknown{nearest(name, METHODS)}; use one of {', '.join(METHODS)}"
            )
        method = METHODS[name]
        if method.dense:
            # Full attention has no sink pages to choose; 0 is within any budget.
            found[name] = {"method": name, "sink_pages": 0}
            continue
        for budget in budgets:
            for window in windows if method.revises else (None,):
                own = {"method": name, "window": window} | budget_fields(budget)
                found[_label(name, window, budget)] = own
    for name in presets:
        chosen = dict(preset_fields(name))
        for budget in budgets:
            for window in windows if METHODS[chosen["method"]].revises else (None,):
                own = chosen | {"window": window} | budget_fields(budget)
                found[_label(f"preset_{name}", window, budget)] = own
    return found


def _label(name: str, window: int | None, budget: float) -> str:
    return f"{name}{'' if window is None else f'-w{window}'}-{budget:g}"
