"""Speed of decoding: the methods of this library, and transformers beside them, in one run.

The contestants take turns, a few steps each, in an order that rotates, so that whatever else the machine does
meets all of them. Times are wall time of single steps, the token on the host; ratios are medians over rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from retro_jax import DecodeConfig, Model, decode_step, init_state
from retro_jax.experiments.bench.decode_command import BenchDecodeFlags
from retro_jax.experiments.bench.transformers_export import export
from retro_jax.experiments.io.files import write_bytes, write_json
from retro_jax.experiments.io.folders import check_new
from retro_jax.experiments.io.progress import Progress
from retro_jax.experiments.io.provenance import cpus, provenance
from retro_jax.experiments.io.tables import markdown
from retro_jax.experiments.machine.programs import release
from retro_jax.experiments.pictures.files import pictures
from retro_jax.experiments.pictures.panels import FULL, QUEST, Curves, Line, Scale, looks
from retro_jax.experiments.pictures.words import counted, shortened
from retro_jax.generate import run_prefill
from retro_jax.methods import METHODS
from retro_jax.presets import preset_fields
from retro_jax.sharding import mesh_of

REFERENCE = Path(__file__).with_name("transformers_reference.py")
WARM_UP_STEPS = 3


class Contestant(Protocol):
    """Something that decodes greedily from a prefilled context."""

    name: str

    @property
    def kv_bytes(self) -> float | None:
        """Bytes of keys, values and page statistics that a step reads for a sequence; None: not known."""
        ...

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """Decodes so many steps; returns each one's milliseconds and tokens (one per sequence)."""
        ...


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def _step(params, model, config, state, tokens):
    state, logits = decode_step(params, model, config, state, tokens)
    return state, jnp.argmax(logits, -1).astype(jnp.int32)


class Ours:
    """One method of this library.

    Args:
        name: for the table.
        model: the model.
        config: how to decode.
        ids: the context to prefill.
        capacity: tokens that the cache holds.
        progress: told about the prefill.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        config: DecodeConfig,
        ids: Int[np.ndarray, "B T"],
        capacity: int,
        progress: Callable[[str, int, int], None],
    ):
        self.name, self._model, self._config = name, model, config
        state = init_state(model.config, config, len(ids), capacity)
        self._state, logits = run_prefill(
            model, config, state, list(ids), lambda stage, *counts: progress(f"{name}: {stage}", *counts)
        )
        self._tokens = jax.block_until_ready(jnp.argmax(logits, -1).astype(jnp.int32))

    @property
    def kv_bytes(self) -> float:
        """As `Contestant`, of the latest step."""
        return float(np.mean(self._state.metrics.kv_bytes))

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """As `Contestant`."""
        milliseconds, tokens = [], []
        for _ in range(count):
            start = time.perf_counter()
            self._state, self._tokens = _step(
                self._model.params, self._model.config, self._config, self._state, self._tokens
            )
            values = np.asarray(self._tokens)
            milliseconds.append((time.perf_counter() - start) * 1e3)
            tokens.append(values.tolist())
        return milliseconds, tokens


class Transformers:
    """Hugging Face transformers on the same weights, in a process of its own.

    Args:
        python: an interpreter that has torch and transformers.
        model: exported to a temporary folder.
        ids: the context to prefill.

    Raises:
        ValueError: the interpreter does not start, or the model cannot be exported.
    """

    name = "transformers"
    kv_bytes = None

    def __init__(self, python: Path, model: Model, ids: Int[np.ndarray, "B T"]):
        self._folder = tempfile.TemporaryDirectory(prefix="retro-jax-export-")
        folder = Path(self._folder.name)
        export(model, folder)
        np.save(folder / "ids.npy", ids)
        arguments = [folder, folder / "ids.npy", cpus(), model.config.dtype]
        command = [python, REFERENCE, *arguments]
        self._log = folder / "stderr.txt"
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        except OSError as error:
            raise ValueError(f"--reference {python} does not run: {error}; name an interpreter") from None
        self.version = self._answer()["version"]

    def steps(self, count: int) -> tuple[list[float], list[list[int]]]:
        """As `Contestant`."""
        self._process.stdin.write(json.dumps({"steps": count}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["milliseconds"], answer["tokens"]

    def close(self) -> None:
        """Ends the process and removes the exported weights."""
        self._process.communicate()
        self._folder.cleanup()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text().strip().splitlines()[-1:]
            raise ValueError(f"the interpreter of --reference failed: {' '.join(last)}")
        return json.loads(line)


class BenchDecode(BenchDecodeFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Runs all contestants and prints the tables."""
        configs = self.configurations()
        load = os.getloadavg()[0]
        capacity = max(self.contexts) + WARM_UP_STEPS + self.rounds * self.steps
        model = self.load(list(configs.values()), self.batch, capacity, together=True)
        with Progress() as progress, jax.set_mesh(mesh_of(model.params)):
            measured = [self._measure(model, configs, context, progress) for context in self.contexts]
        values = {
            "model": self.model,
            "dtype": model.config.dtype,
            "batch": self.batch,
            "configs": {name: asdict(config) for name, config in configs.items()},
            "contexts": measured,
            "steps": WARM_UP_STEPS + self.rounds * self.steps,
            "load_before": load,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "provenance": provenance(),
        }
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.out, values)
            for name, picture in latency_pictures(values, self.out.stem).items():
                write_bytes(self.out.with_name(name), picture)
        self.show(values, speed_report(values))
        if load > cpus() / 2 and not self.json:
            print(f"The machine was busy: load {load:.1f} on {cpus()} CPUs before.", file=sys.stderr)

    def configurations(self) -> dict[str, DecodeConfig]:
        """How to decode, by contestant.

        Raises:
            ValueError: a flag is out of its range, or two contradict each other.
        """
        if min(*self.contexts, self.batch, self.steps, self.rounds) < 1:
            raise ValueError("--contexts, --batch, --steps and --rounds must be 1 or more")
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"--out {self.out} is no JSON file; name it *.json")
        check_new(self.out)
        if self.reference and "full" not in self.methods:
            raise ValueError("--reference is compared with full attention; add full to --methods")
        configs = {}
        for name in self.methods:
            if name in METHODS and METHODS[name].revises:
                configs |= {f"{name} w={w}": self.config.config(method=name, window=w) for w in self.windows}
            else:
                configs[name] = self.config.config(method=name)
        for name in self.presets:
            configs[f"preset {name}"] = self.config.config(**preset_fields(name))
        return configs

    def _measure(
        self, model: Model, configs: dict[str, DecodeConfig], context: int, progress: Progress
    ) -> dict:
        """One context: what all contestants took, as JSON values."""
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(model.config.vocab_size, size=(self.batch, context), dtype=np.int32)
        capacity = context + WARM_UP_STEPS + self.rounds * self.steps
        # The reference first: an interpreter that fails should do so before the long prefills.
        reference = Transformers(self.reference, model, ids) if self.reference else None
        contestants: list[Contestant] = [
            Ours(name, model, config, ids, capacity, progress) for name, config in configs.items()
        ]
        if reference:
            contestants.append(reference)
        milliseconds, tokens = take_turns(contestants, self.rounds, self.steps, progress)
        if reference:
            reference.close()
        release()  # the next context's programs are other ones
        return {
            "context": context,
            "contestants": {
                name: row | {"kv_bytes": contestant.kv_bytes}
                for contestant, (name, row) in zip(contestants, results(milliseconds).items(), strict=True)
            },
            "reference": reference and reference.version,
            "reference_agrees_for_steps": reference and agreement(tokens["full"], tokens[reference.name]),
            "milliseconds": milliseconds,
        }


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


def results(milliseconds: dict[str, list[list[float]]]) -> dict[str, dict]:
    """Returns each contestant's median step, its spread, and its time over every other's."""
    medians = {name: np.median(np.array(turns), axis=1) for name, turns in milliseconds.items()}
    return {
        name: {
            "ms_per_step": float(np.median(turns)),
            "ms_10_90": [float(value) for value in np.percentile(turns, (10, 90))],
            "time_over": {other: float(np.median(medians[name] / medians[other])) for other in milliseconds},
        }
        for name, turns in milliseconds.items()
    }


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Returns for how many steps from the first on two contestants chose the same tokens."""
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def speed_report(values: dict) -> str:
    """Returns the results of every context as Markdown."""
    parts = []
    for measured in values["contexts"]:
        parts.append(f"{measured['context']} tokens of context")
        parts.append(speed_table(measured["contestants"], values["batch"]))
        if measured["reference"]:
            parts.append(
                f"{measured['reference']}: the tokens of full attention in the first "
                f"{measured['reference_agrees_for_steps']} of {values['steps']} steps."
            )
    return "\n\n".join(parts)


def speed_table(contestants: dict[str, dict], batch: int) -> str:
    """Returns the results of one context as a Markdown table, with each time over every other."""
    others = list(contestants)
    header = ["", "ms/step", "10%-90%", "tokens/s", "KV MB/step", *(f"time / {name}" for name in others)]
    body = [
        [
            name,
            f"{row['ms_per_step']:.1f}",
            "{:.1f}-{:.1f}".format(*row["ms_10_90"]),
            f"{batch * 1e3 / row['ms_per_step']:.1f}",
            "" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1e6:.2f}",
            *(f"{row['time_over'][other]:.2f}" for other in others),
        ]
        for name, row in contestants.items()
    ]
    return markdown(header, body)


def latency_pictures(values: dict, stem: str) -> dict[str, bytes]:
    """Draws time and traffic of a step against context.

    Args:
      values: as in the JSON file.
      stem: of the picture's name.

    Returns:
      PNG files by name.
    """
    measured = values["contexts"]
    method_looks = looks(measured[0]["contestants"], {"full": FULL, "quest": QUEST})
    contexts = [each["context"] for each in measured]
    times, traffic = [], []
    for name, look in method_looks.items():
        rows = [each["contestants"][name] for each in measured]
        low, high = zip(*(row["ms_10_90"] for row in rows), strict=True)
        times.append(Line(name, look, contexts, [row["ms_per_step"] for row in rows], low, high))
        if rows[0]["kv_bytes"] is not None:
            traffic.append(Line(name, look, contexts, [row["kv_bytes"] / 1e6 for row in rows]))
    x = Scale("context (tokens)", log=True, at_values=True)
    step = f"ms per step of {counted(values['batch'], 'sequence')}"
    panels = [
        Curves(times, x, Scale(step, shown=(0.0,))),
        Curves(traffic, x, Scale("KV MB read by a step, for a sequence", shown=(0.0,))),
    ]
    turns = next(iter(measured[0]["milliseconds"].values()))
    steps = counted(len(turns) * len(turns[0]), "step")
    notes = [
        f"n = {steps} of each, in {counted(len(turns), 'turn')}; medians",
        values["provenance"]["device"],
    ]
    title = f"{shortened(values['model'])} ({values['dtype']}): a decode step"
    return pictures(stem, panels, title, notes, interval="10th to 90th percentile of the steps")
