"""The command line `retro-jax`."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments import chat
from experiments.bench_decode import BenchDecode
from experiments.bench_kernels import BenchKernels
from experiments.bench_tpu import BenchTpuStatic
from experiments.compare import Texts, compare, identity, summary
from experiments.compare_plots import comparison_pictures
from experiments.estimates import estimate
from experiments.flags import (
    Command,
    ConfigArguments,
    Flag,
    NoPrefix,
    Preset,
    SamplingArguments,
    SamplingFlags,
    TextCommand,
    choose_preset,
    common_flags,
    preset_flags,
)
from experiments.overlap import Overlap
from experiments.progress import Progress, Rates
from experiments.provenance import provenance
from experiments.report import Report
from experiments.results import ResultsFolder, print_json, write_bytes, write_json
from experiments.run import RunCommands
from experiments.sweep import VARIED, Sweep
from experiments.tables import comparison_report, score_table
from experiments.text import file_tokens, read_text, read_tokens
from retro_jax import Generation, Model, generate, score

CommonFlags = common_flags(*VARIED)
CommonArguments = Annotated[CommonFlags, NoPrefix]
SweepArguments = Annotated[Sweep, NoPrefix]


@dataclass(kw_only=True)
class Generate(Command):
    """Continue prompts, or chat, with full attention, Quest or RetroAttention.

    The text goes to stdout as it is generated (several prompts: when all are finished), a summary to stderr.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give the flag again for more, which are generated as one batch."""
    prompt_file: tuple[Path, ...] = ()
    """UTF-8 text files to continue, as further prompts."""
    token_ids: Path | None = None
    """A .npy file of integers as further prompts, shape (tokens,) or (prompts, tokens)."""
    prompt_chars: int | None = None
    """Use only so many characters of each prompt file."""
    chat: Flag[bool] = False
    """Treat each prompt as a user's message, by the model's chat template; without any prompt, talk."""
    max_new_tokens: int = 256
    """Tokens to generate for each prompt, or in each reply."""
    capacity: int | None = None
    """Tokens that the cache holds; None: what is needed, or up to 4096 to talk."""
    sampling: SamplingArguments = field(default_factory=SamplingFlags)
    preset: Preset | None = None
    """Take the defaults of the flags below from a preset: Quest, the paper's method, or the best found at the
    same memory traffic."""
    config: ConfigArguments = field(default_factory=preset_flags)

    def run(self) -> None:
        """Generates, once or turn by turn."""
        config, sampling = self.config.config(), self.sampling.sampling()
        prompts = [*self.prompt, *(read_text(path, chars=self.prompt_chars) for path in self.prompt_file)]
        if self.token_ids:
            prompts += file_tokens(self.token_ids, None).tolist()
        if not prompts and not self.chat:
            raise ValueError(
                "there is nothing to continue; pass --prompt TEXT, --prompt-file FILE, --token-ids FILE.npy "
                "or --chat"
            )
        model = self.load()
        if self.chat and model.tokenizer is None:
            raise ValueError(f"{model.config.name} has no tokenizer, so it cannot chat; use another model")
        if not prompts:
            self._talk(model)
            return
        if self.chat:
            prompts = [chat.first_turn(model.tokenizer, prompt) for prompt in prompts]
        streamed = len(prompts) == 1 and model.tokenizer is not None and not self.json
        result, rates = self._generate(model, prompts, capacity=self.capacity, streamed=streamed)
        if self.json:
            values = {
                "model": self.model,
                "config": asdict(config),
                "sampling": asdict(sampling),
                "texts": result.texts,
                "tokens": result.tokens,
                "finished": result.finished,
                "metrics": result.metrics.summary() if result.metrics else None,
                "seconds": rates.seconds,
                "steps_per_second": rates.per_second("decode"),
                "provenance": provenance(),
            }
            print_json(values)
        elif not streamed:
            for number, (text, tokens) in enumerate(zip(result.texts, result.tokens, strict=True), 1):
                print(f"--- {number} ---\n{text if model.tokenizer else ' '.join(map(str, tokens))}")

    def _generate(
        self,
        model: Model,
        prompts: list,
        capacity: int | None,
        streamed: bool,
        previous: Generation | None = None,
    ) -> tuple[Generation, Rates]:
        with Progress() as show:
            rates = Rates(show)

            def stream(_: int, piece: str) -> None:
                if sys.stdout.isatty():
                    show.stop()
                print(piece, end="", flush=True)

            result = generate(
                model,
                prompts,
                self.config.config(),
                self.max_new_tokens,
                sampling=self.sampling.sampling(),
                capacity=capacity,
                stream=stream if streamed else None,
                progress=rates,
                previous=previous,
            )
        if streamed:
            print(flush=True)
        print(_summary(result, rates), file=sys.stderr)
        return result, rates

    def _talk(self, model: Model) -> None:
        """Reads messages from stdin until it ends, on one cache while the template keeps earlier turns."""
        if self.json:
            raise ValueError("--json cannot be used to talk; pass --prompt with --chat")
        capacity = self.capacity or min(4096, model.config.max_positions)
        messages, held, result = [], [], None
        print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
        while message := _read_message():
            messages.append({"role": "user", "content": message})
            whole = chat.prompt(model.tokenizer, messages)
            ids = chat.continuation(whole, held)
            if ids is None:
                print(
                    "The chat template makes something else of earlier turns than the cache holds; "
                    "it is made anew.",
                    file=sys.stderr,
                )
                ids, result = whole, None
            result, _ = self._generate(model, [ids], capacity, streamed=True, previous=result)
            held = [*whole, *result.tokens[0]]
            messages.append({"role": "assistant", "content": result.texts[0]})


@dataclass(kw_only=True)
class Score(TextCommand):
    """Measure how likely a model finds a text when one method decodes along it.

    Prints mean negative log-likelihood (nats per token), perplexity, and both by position.
    """

    preset: Preset | None = None
    """Take the defaults of the flags below from a preset: Quest, the paper's method, or the best found at the
    same memory traffic."""
    config: ConfigArguments = field(default_factory=preset_flags)

    def run(self) -> None:
        """Scores the texts as one batch."""
        config = self.config.config()
        model = self.load()
        ids, names = read_tokens(model, self.text, self.token_ids, self.tokens, self.skip_chars)
        texts = Texts(names, ids, self.prompt_tokens)
        with Progress() as show:
            rates = Rates(show)
            result = score(model, texts.ids, config, prompt_tokens=texts.prompt_tokens, progress=rates)
        mean = estimate(result.nll)
        if self.json:
            values = {
                "model": self.model,
                "config": asdict(config),
                "tokens": ids.shape[1],
                "prompt_tokens": texts.prompt_tokens,
                "nll": asdict(mean),
                "perplexity": float(np.exp(mean.mean)),
                "texts": {name: float(row.mean()) for name, row in zip(names, result.nll, strict=True)},
                "metrics": result.metrics.summary() if result.metrics else None,
                "seconds": rates.seconds,
                "provenance": provenance(),
            }
            print_json(values)
        else:
            print(score_table(result.nll, texts.prompt_tokens, names, self.bin_tokens))


@dataclass(kw_only=True)
class Compare(TextCommand):
    """Run full attention, Quest, RetroAttention and others over the same text, and show what each loses.

    Writes a table, JSON and pictures, and each run's value for every token. Each run is saved when it is
    finished: the same command continues where it was stopped, and further values and methods add rows.
    """

    sweep: SweepArguments = field(default_factory=Sweep)
    budgets_together: Flag[bool] = False
    """Decode the texts of all budgets as one batch: faster on an accelerator, and as many times the cache."""
    out: Path | None = None
    """Folder for the results; None: one under runs/ that is named after the model and the settings."""
    config: CommonArguments = field(default_factory=CommonFlags)

    def run(self) -> None:
        """Runs what the folder does not have yet, then writes and prints the comparison."""
        configs = self.sweep.configurations(self.config.config(method="full", sink_pages=0))
        model = self.load()
        ids, names = read_tokens(model, self.text, self.token_ids, self.tokens, self.skip_chars)
        texts = Texts(names, ids, self.prompt_tokens)
        what = identity(self.model, model, texts, configs[0])
        folder = ResultsFolder(self.out or _default_folder(what), what)
        runs = compare(model, texts, configs, folder, Progress, budgets_together=self.budgets_together)
        report = comparison_report(what, runs, self.bin_tokens)
        values = summary(what, runs, self.bin_tokens)
        write_json(folder.path / "results.json", values)
        write_bytes(folder.path / "table.md", report.encode())
        pictures = comparison_pictures(what, runs)
        for name, picture in pictures.items():
            write_bytes(folder.path / name, picture)
        if self.json:
            print_json(values)
        else:
            print(report)
            print(f"Table, JSON, pictures and raw values: {folder.path}")
            for name in pictures:
                print(folder.path / name)


Bench = (
    Annotated[BenchDecode, tyro.conf.subcommand("decode")]
    | Annotated[BenchKernels, tyro.conf.subcommand("kernels")]
    | Annotated[BenchTpuStatic, tyro.conf.subcommand("tpu-static")]
)

Commands = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Overlap, tyro.conf.subcommand("overlap")]
    | Annotated[
        Bench,
        tyro.conf.subcommand("bench", description="Measure speed: of decoding a model, or of its kernels."),
    ]
    | Annotated[
        RunCommands,
        tyro.conf.subcommand("run", description="Run a named configuration: a model, a task, and methods."),
    ]
    | Annotated[Report, tyro.conf.subcommand("report")]
)

DESCRIPTION = """Decode language models with full attention, Quest and RetroAttention.

Start with: retro-jax generate smollm2-135m --prompt "Once upon a time"
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; errors in what was asked for are one line on stderr and exit status 2."""
    choose_preset(sys.argv[1:] if arguments is None else arguments)
    command = tyro.cli(Commands, prog="retro-jax", description=DESCRIPTION, args=arguments)
    try:
        command.run()
    except KeyboardInterrupt:
        print("\nretro-jax: stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError) as error:
        if command.traceback:
            raise
        print(f"retro-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _read_message() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _default_folder(what: dict) -> Path:
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    name = Path(what["model"]).name.replace(":", "-")
    return Path("runs") / f"compare-{name}-{digest}"


def _summary(result: Generation, rates: Rates) -> str:
    """One line on how fast it was and what it loaded."""
    parts = [f"{sum(map(len, result.tokens))} tokens in {rates.seconds:.1f} s"]
    rate = rates.per_second("decode")
    if rate:
        parts.append(f"{rate * len(result.tokens):.1f} tokens/s after the first steps")
    if result.metrics is not None:
        metrics = result.metrics.summary()
        exposure = metrics["exposure"][-1]
        parts.append(f"{metrics['kv_bytes'] / 1e6:.2f} MB of KV cache read per token")
        if exposure is not None:
            parts.append(f"{metrics['pages_loaded']:.1f} pages per step and KV head, exposure {exposure:.2f}")
    return "[" + "; ".join(parts) + "]"


if __name__ == "__main__":
    main()
