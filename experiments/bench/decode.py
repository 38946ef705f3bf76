"""Speed of decoding: the methods of this library, and other programs beside them, in one run.

The contestants take turns, a few steps each, in an order that rotates, so that whatever else the machine does
meets all of them. Times are wall time of single steps, the token on the host; ratios are medians over rounds.
Where not all caches fit the memory, groups of contestants follow each other, and ratios between those of
different groups are ratios of medians.

Beside them stands the limit: what the bytes of weights and cache that a step must read take at the bandwidth
that a device reads with in the same run; each of several reads its own part.
"""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retro_jax import DecodeConfig, Model
from retro_jax.drafts import weight_bytes
from retro_jax.experiments.bench.bandwidth import read_bandwidth
from retro_jax.experiments.bench.contestants import Contestant, Ours
from retro_jax.experiments.bench.decode_command import BenchDecodeFlags
from retro_jax.experiments.bench.decode_processes import folder_of_processes, torch_step, transformers
from retro_jax.experiments.bench.decode_report import latency_pictures, speed_report
from retro_jax.experiments.bench.limits import dense_kv_bytes, limit_ms
from retro_jax.experiments.io.checks import check_least
from retro_jax.experiments.io.files import write_bytes, write_json
from retro_jax.experiments.io.folders import check_new
from retro_jax.experiments.io.models import check_positions
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import cpus, provenance
from retro_jax.experiments.io.settings import by_distinct_name
from retro_jax.experiments.machine.programs import release
from retro_jax.methods import METHODS
from retro_jax.models.config import ModelConfig
from retro_jax.presets import preset_fields
from retro_jax.sharding import mesh_of

WARM_UP_STEPS = 3


class BenchDecode(BenchDecodeFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Runs all contestants and prints the tables."""
        configs = self.configurations()
        load = os.getloadavg()[0]
        capacity = self._capacity(max(self.contexts))
        together = self.together or len(configs)
        model = self.load(
            list(configs.values()), self.batch, capacity, together=together, check=self.check_positions
        )
        bandwidth = max(read_bandwidth(self.ceiling_bytes, calls=10, warm_up=2).values())
        with Progress() as progress, jax.set_mesh(mesh_of(model.params)):
            measured = [
                self._measure(model, configs, context, bandwidth, progress) for context in self.contexts
            ]
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "batch": self.batch,
            "prefill": self.prefill,
            "data_devices": self.data_devices,
            "model_devices": self.model_devices,
            "configs": {name: asdict(config) for name, config in configs.items()},
            "weight_bytes": int(weight_bytes(model.params, model.config, tokens=0)),
            "ceiling_gb_per_s": bandwidth,
            "contexts": measured,
            "warm_up_steps": WARM_UP_STEPS,
            "rounds": self.rounds,
            "steps_per_round": self.steps,
            "load_before": load,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "provenance": provenance(),
        }
        if self.out is not None and jax.process_index() == 0:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.out, values)
            for name, picture in latency_pictures(values, self.out.stem).items():
                write_bytes(self.out.with_name(name), picture)
        self.show(values, speed_report(values))
        if load > cpus() / 2 and not self.json:
            print(f"\nThe machine was busy: load {load:.1f} on {cpus()} CPUs before.", file=sys.stderr)

    def configurations(self) -> dict[str, DecodeConfig]:
        """How to decode, by contestant.

        Raises:
            ValueError: a flag is out of its range, or two contradict each other.
        """
        check_least(contexts=self.contexts, batch=self.batch, steps=self.steps, rounds=self.rounds)
        check_least(ceiling_bytes=self.ceiling_bytes)
        check_least(0, seed=self.seed)
        if not self.methods and not self.presets:
            raise ValueError("there is nothing to measure; name --methods or --presets")
        if self.together is not None and self.together < 1:
            raise ValueError(f"--together {self.together} is below 1; leave it out for all at once")
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"--out {self.out} is no JSON file; name it *.json")
        check_new(self.out)
        check_new(self.out and self.out.with_suffix(".png"))
        if self.batch % self.data_devices:
            over = f"--data-devices {self.data_devices}"
            raise ValueError(f"--batch {self.batch} does not divide over {over}; use a multiple")
        if self.data_devices * self.model_devices > 1 and (self.reference or self.torch):
            raise ValueError("--reference and --torch decode on one device; leave them or the devices out")
        if self.reference and "full" not in self.methods:
            raise ValueError("--reference is compared with full attention; add full to --methods")
        if self.reference and not self.prefill:
            raise ValueError("--reference has the same context prefilled; leave --no-prefill out")
        for flag, python in (("--reference", self.reference), ("--torch", self.torch)):
            if python is not None and not shutil.which(python):
                raise ValueError(f"{flag} {python} is no program that can be run; name an interpreter")
        methods = {}
        for name in self.methods:
            if name in METHODS and METHODS[name].revises:
                methods |= {f"{name} w={w}": {"method": name, "window": w} for w in self.windows}
            else:
                methods[name] = {"method": name}
        presets = {f"preset {name}": preset_fields(name) for name in self.presets}
        configs = by_distinct_name(self.config.configs(methods | presets).values())
        for name, config in configs.items():
            if config.eviction and not self.prefill:
                raise ValueError(f"{name} keeps what a prompt tells it to; leave it or --no-prefill out")
        return configs

    def check_positions(self, model: ModelConfig) -> None:
        """Raises ValueError if a model has no room for the longest context and what is decoded from there."""
        context = max(self.contexts)
        beside = f"--rounds {self.rounds} of --steps {self.steps}{' and --scan' * self.scan}"
        check_positions(model, self._capacity(context), "--contexts", context, beside)

    def _capacity(self, context: int) -> int:
        """Tokens of a sequence that one contestant decodes or begins with."""
        single = WARM_UP_STEPS + self.rounds * self.steps
        return context + single + (self.rounds + 2) * self.steps * self.scan

    def _measure(
        self,
        model: Model,
        configs: dict[str, DecodeConfig],
        context: int,
        bandwidth: float,
        progress: Progress,
    ) -> dict:
        """One context: what all contestants took, as JSON values."""
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(model.config.vocab_size, size=(self.batch, context), dtype=np.int32)
        capacity = self._capacity(context)
        reference = torch = None
        milliseconds, tokens, about, groups = {}, {}, {}, []
        with folder_of_processes() as folder:
            # Other programs first: an interpreter that fails should do so before the long prefills.
            if self.reference:
                reference = transformers(self.reference, model, ids, Path(folder))
            if self.torch:
                torch = torch_step(self.torch, model, self.batch, capacity, Path(folder))
            others = [other for other in (reference, torch) if other]
            for names in itertools.batched(configs, self.together or len(configs)):
                contestants: list[Contestant] = [
                    *(
                        Ours(name, model, configs[name], ids, capacity, self.prefill, progress)
                        for name in names
                    ),
                    *others,
                ]
                times, chosen = take_turns(contestants, self.rounds, self.steps, progress)
                milliseconds, tokens = milliseconds | times, tokens | chosen
                read = {each.name: (each.kv_bytes, each.expert_bytes) for each in contestants}
                scans = scan_times(contestants, self.rounds, self.steps) if self.scan else {}
                about |= {name: (*of_step, scans.get(name, {})) for name, of_step in read.items()}
                groups.append([each.name for each in contestants])
                for other in others:
                    other.close()
                del contestants  # whose caches make room for the next
                others = []
        release()  # the next context's programs are other ones
        rows = results(milliseconds, groups)
        full = next((name for name, config in configs.items() if config.attention.dense), None)
        for name, row in rows.items():
            bytes_read, experts, scan = about[name]
            row |= {"kv_bytes": bytes_read, "scan_ms": None} | scan
            if model.config.experts is not None:
                row["expert_bytes"] = experts
            if torch and name == torch.name:
                # The whole cache, dense; transformers' cache is its own matter.
                bytes_read = dense_kv_bytes(model, capacity)
            row["limit_ms"] = None
            if bytes_read is not None:
                row["limit_ms"] = limit_ms(model, self.batch, bytes_read, experts, bandwidth)
        return {
            "context": context,
            "contestants": rows,
            "groups": groups,
            "reference": reference and reference.version,
            "torch": torch and torch.version,
            "reference_agrees_for_steps": reference and agreement(tokens[full], tokens[reference.name]),
            "milliseconds": milliseconds,
        }


def scan_times(contestants: Sequence[Contestant], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Returns of a step where many are taken in one call: milliseconds, medians over rounds.

    Where the device says so, also how long it is busy, launches, and both by kernel.
    """
    able = [contestant for contestant in contestants if contestant.scan is not None]
    for contestant in able:
        contestant.scan(steps)  # compiles
    times = [{contestant.name: contestant.scan(steps) for contestant in able} for _ in range(rounds)]
    found = {each.name: {"scan_ms": float(np.median([time[each.name] for time in times]))} for each in able}
    for contestant in able:
        if told := contestant.executed(steps):
            found[contestant.name] |= asdict(told)
    return found


def take_turns(
    contestants: Sequence[Contestant], rounds: int, steps: int, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, list[list[float]]], dict[str, list[list[int]]]]:
    """Warms all contestants up, then lets each take `steps` steps per round; another begins each round.

    Returns:
        milliseconds per contestant, round and step; tokens per contestant and step, warm-up included.
    """
    milliseconds = {contestant.name: [] for contestant in contestants}
    tokens = {contestant.name: contestant.steps(WARM_UP_STEPS)[1] for contestant in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            times, chosen = contestant.steps(steps)
            milliseconds[contestant.name].append(times)
            tokens[contestant.name] += chosen
        progress("rounds", number + 1, rounds)
    return milliseconds, tokens


def results(milliseconds: dict[str, list[list[float]]], groups: Sequence[Sequence[str]]) -> dict[str, dict]:
    """Returns each contestant's median step, its spread, and its time over every other's.

    Args:
      milliseconds: by contestant, round and step.
      groups: names of those that took turns with each other. Rounds of others are no pairs: there the ratio
        is that of the median steps.
    """
    rounds = {name: np.median(np.array(turns), axis=1) for name, turns in milliseconds.items()}
    steps = {name: float(np.median(turns)) for name, turns in milliseconds.items()}
    group_of = {name: number for number, group in enumerate(groups) for name in group}

    def over(name: str, other: str) -> float:
        if group_of[name] != group_of[other]:
            return steps[name] / steps[other]
        return float(np.median(rounds[name] / rounds[other]))

    return {
        name: {
            "ms_per_step": steps[name],
            "ms_10_90": [float(value) for value in np.percentile(turns, (10, 90))],
            "time_over": {other: over(name, other) for other in milliseconds},
        }
        for name, turns in milliseconds.items()
    }


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Returns for how many steps from the first on two contestants chose the same tokens."""
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return equal.index(False) if False in equal else len(equal)
