"""The command `run`: a named configuration, with any field changed, through to its results."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from retro_jax import DecodeConfig, Model, load_model, make_mesh, params_on
from retro_jax.experiments.io.folders import digest
from retro_jax.experiments.io.models import check_tokenizer, known_model, known_tokenizer, with_score
from retro_jax.experiments.io.progress import Progress, Rates
from retro_jax.experiments.io.provenance import provenance
from retro_jax.experiments.machine.compile_cache import keep_programs
from retro_jax.experiments.machine.devices import local_devices
from retro_jax.experiments.machine.programs import release
from retro_jax.experiments.runs.command import RunFlags
from retro_jax.experiments.runs.compile import check_programs, compile_run, programs_text
from retro_jax.experiments.runs.config import RunConfig
from retro_jax.experiments.runs.folder import RunFolder, run_identity
from retro_jax.experiments.runs.plan import check_memory_of, make_plan, plan_text, plan_values
from retro_jax.experiments.runs.work import (
    ROUNDS,
    Row,
    check_positions,
    decode_batch,
    decode_many,
    encode,
    make_batches,
)

TERMINATED = 128 + signal.SIGTERM
WITHOUT_TOKENIZER = ", which tasks need; use another model"
"""What a model without one is told."""


class Run(RunFlags):
    """The command, with its work."""

    def run(self) -> None:
        """Runs what the folder does not have yet."""
        self.config.check()
        if self.dry_run or self.compile:
            self._show()
            return
        if self.distributed:
            jax.distributed.initialize()  # before anything else asks for a device
        local_devices()
        plan = make_plan(self.config)
        examples = self.config.task.examples(self.config.sampling.seed, self.config.limit)
        told = digest([example.told() for example in examples])
        identity = run_identity(self.name, self.config.identity(), self.config.configurations(), told)
        code = digest(identity)
        out = self.out or Path("runs") / f"{self.name}-{code}"
        RunFolder.check(out, identity)
        if known := known_model(self.config.model, self.config.dtype):
            check_memory_of(self.config, known, plan.positions, plan.forced)
        with stop_on_sigterm() as stopping, _mesh(self.config):
            model = _load(self.config)
            rows = [
                encode(model.tokenizer, example, sample)
                for example in examples
                for sample in range(self.config.samples)
            ]
            check_positions(model.config, rows)
            longest = max(row.tokens for row in rows)
            check_memory_of(self.config, model.config, longest, plan.forced, loaded=True)
            with RunFolder(out, identity, jax.process_index()) as folder:
                finished = work(self.config, model, rows, folder, code, stopping)
        if not finished:
            print(f"retro-jax: stopped by SIGTERM; the same command continues {out}", file=sys.stderr)
            sys.exit(TERMINATED)
        results = len(folder.done())
        shown = f"{results} results: {out}\nTables and plots: retro-jax report {out} --out page.md"
        self.show({"folder": str(out), "results": results}, shown)

    def _show(self) -> None:
        """Prints the plan, with its compiled programs where they are asked for."""
        plan = make_plan(self.config)
        programs = compile_run(self.config, plan) if self.compile else []
        text = plan_text(self.config, plan, self.config.configurations())
        if programs:
            text += f"\n\n{programs_text(programs, self.config)}"
        self.show(plan_values(self.config, plan) | {"programs": [asdict(each) for each in programs]}, text)
        if programs:
            check_programs(programs, self.config)


@dataclass(frozen=True)
class Job:
    """A batch that one method decodes.

    Attributes:
      config: the run.
      label: the method's name.
      decode: how it decodes.
      batch: rows of one kind, all forced or all generated.
      missing: places in the batch that have no result yet.
      folder: that results are kept in.
      code: the run's digest, kept with each.
    """

    config: RunConfig
    label: str
    decode: DecodeConfig
    batch: Sequence[Row]
    missing: Sequence[int]
    folder: RunFolder
    code: str

    def keep(self, results: Mapping[int, dict]) -> None:
        """Appends results, by their places in the batch."""
        self.folder.append(
            [
                {
                    "example": self.batch[place].example.id,
                    "method": self.label,
                    "sample": self.batch[place].sample,
                    "config": self.code,
                    "seed": self.config.sampling.seed,
                }
                | result
                for place, result in results.items()
            ]
        )


def work(
    config: RunConfig,
    model: Model,
    rows: list[Row],
    folder: RunFolder,
    code: str,
    stopping: Callable[[], bool],
) -> bool:
    """Decodes every batch by every method that is not finished; returns whether it came to the end.

    Args:
      config: the run.
      model: on the mesh, if there is one.
      rows: all replies to be made.
      folder: opened.
      code: the run's digest, kept with each result.
      stopping: asked before each batch, and after each reply where sequences come and go.
    """
    configs, done = config.configurations(), folder.done()
    refills = config.refills(any(row.forced for row in rows))
    size = config.batch
    if refills:  # few waits for the last replies of a batch, and work for every host
        size = max(min(ROUNDS * size, -(-len(rows) // jax.process_count())), size)
    jobs = [
        (batch, label) for batch in make_batches(rows, size) for label in configs
    ]  # methods by turns, so that a run that is stopped can be compared
    start = {"config": code, "replies": len(rows)} | provenance()  # the report tells what is missing
    folder.note(f"provenance-{folder.process}.jsonl", start)
    for number, (batch, label) in enumerate(jobs):
        missing = [
            index for index, row in enumerate(batch) if (row.example.id, label, row.sample) not in done
        ]
        if not missing or number % jax.process_count() != jax.process_index():
            continue
        if stopping():
            return False
        job = Job(config, label, configs[label], batch, missing, folder, code)
        with Progress(f"{number + 1}/{len(jobs)} {label}: ") as show:
            took = _refilled(job, model, show, stopping) if refills else _at_once(job, model, show)
        if took is None:
            return False
        timing = {"method": label, "batch": config.batch} | took
        folder.note(f"timings-{folder.process}.jsonl", timing)
        release()  # the next method's programs are other ones
    return True


def _at_once(job: Job, model: Model, show: Progress) -> dict:
    """Decodes a whole batch and keeps what was missing.

    Returns:
      What it took, without compiling and grading.
    """
    config, rates = job.config, Rates(show)
    sampling = config.sampling.sampling()
    results = decode_batch(model, job.decode, config.task, job.batch, config.batch, sampling, rates)
    job.keep({place: results[place] for place in job.missing})
    return {
        "seconds": rates.seconds - show.compile_seconds,
        "context": max(map(_middle, results)),
        "steps_per_second": rates.per_second("decode"),
    }


def _refilled(job: Job, model: Model, show: Progress, stopping: Callable[[], bool]) -> dict | None:
    """Generates a batch's missing replies, each kept as soon as it is finished.

    Returns:
      What they took, as `_at_once` does; None if the run was stopped before. Steps are not timed:
      between them other prompts are read.
    """
    config, results, seconds = job.config, {}, 0.0
    sampling = config.sampling.sampling()
    for place, result, waited in decode_many(
        model, job.decode, config.task, job.batch, job.missing, config.batch, sampling
    ):
        results[place], seconds = result, seconds + waited
        job.keep({place: result})
        show("replies", len(results), len(job.missing))
        if len(results) < len(job.missing) and stopping():
            return None
    return {
        "seconds": seconds - show.compile_seconds,
        "context": max(map(_middle, results.values())),
        "steps_per_second": None,
        "tokens": sum(result["tokens"] for result in results.values()),
    }


def _middle(result: dict) -> float:
    """Tokens of context in the middle of a reply."""
    return result["prompt_tokens"] + result["tokens"] / 2


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM is only noted; yields what tells whether it came."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _mesh(config: RunConfig) -> contextlib.AbstractContextManager:
    """The mesh that a run names, on this host's devices; nothing for one device of one host."""
    if config.data_devices * config.model_devices == 1 and jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(config.data_devices, config.model_devices, jax.local_devices()))


def _load(config: RunConfig) -> Model:
    """The model, its weights on the current mesh.

    From other folders than those of `retro-jax convert` they are read into the host's memory first, for
    their size.

    Raises:
      ValueError: it has no tokenizer, or does not divide over the mesh.
    """
    check_tokenizer(config.model, known_tokenizer(config.model), WITHOUT_TOKENIZER)
    keep_programs()
    mesh = jax.sharding.get_mesh()
    host = contextlib.nullcontext() if mesh.empty else jax.default_device(jax.local_devices(backend="cpu")[0])
    with Progress() as progress, host:
        model = load_model(
            config.model,
            dtype=config.dtype,
            revision=config.revision,
            progress=progress,
            shardings=None if mesh.empty else params_on(mesh),
        )
    check_tokenizer(model.config.name, model.tokenizer is not None, WITHOUT_TOKENIZER)
    return with_score(model, config.learned)
