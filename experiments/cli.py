"""The command line `retro-jax`: finds the command, reads its flags, runs it, and says what went wrong.

Nothing but the chosen command is imported, and that within `main`, where stopping is no accident.
"""

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TextIO

from retro_jax.experiments.io.interrupt import INTERRUPTED, STOPPED, stop_in_words

if TYPE_CHECKING:
    from retro_jax.experiments.io.flags import Output

DESCRIPTION = """Decode language models with full attention, Quest and RetroAttention.

Start with: retro-jax generate smollm2-135m --prompt "Once upon a time" --budget-tokens 64
"""
SHELLS = ("bash", "zsh", "fish")
"""For which completion can be printed."""
LEAST_COLUMNS = 40
"""Below this width tyro does not come to an end."""
IN_WORDS = ValueError, TypeError, OSError, NotImplementedError, FloatingPointError
"""Errors that this project raises, with all that there is to say."""
UNREAD = 128 + signal.SIGPIPE


@dataclass(frozen=True)
class Entry:
    """A command.

    Attributes:
      place: its class, as "module:name".
      summary: what it does, in one line.
      flags: the class's base that has its flags, for one that is there without JAX; "": the class itself.
      default: fields of a value whose others are the defaults of its flags; empty: the class knows them.
    """

    place: str
    summary: str
    flags: str = ""
    default: Mapping[str, object] = field(default_factory=dict)

    def read(self, prog: str, arguments: Sequence[str]) -> "Output":
        """Reads the flags; ends with status 2 where they are wrong."""
        import tyro

        kind = _find(self.flags or self.place)
        default = kind(**self.default) if self.default else kind.defaults(arguments)
        options = {} if default is None else {"default": default}
        if self.default:
            options["description"] = self.summary
        command = tyro.cli(kind, prog=prog, args=arguments, **options)
        return _find(self.place)(**vars(command)) if self.flags else command


def _find(place: str) -> "type[Output]":
    module, name = place.split(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Group:
    """Commands that share their first word.

    Attributes:
      summary: what they do, in one line.
      entries: makes the commands, by their next word.
    """

    summary: str
    entries: Callable[[], Mapping[str, Entry]]


def _benchmarks() -> Mapping[str, Entry]:
    return {
        "decode": Entry(
            "retro_jax.experiments.bench.decode:BenchDecode",
            "Measure the speed of decoding: methods take turns in one run, for each length of the context.",
            "retro_jax.experiments.bench.decode_command:BenchDecodeFlags",
        ),
        "verify": Entry(
            "retro_jax.experiments.bench.verify:BenchVerify",
            "Measure verified decoding beside full attention, and predict it for any acceptance.",
            "retro_jax.experiments.bench.verify_command:BenchVerifyFlags",
        ),
        "throughput": Entry(
            "retro_jax.experiments.bench.throughput:BenchThroughput",
            "Measure tokens per second over many prompts: fixed batches beside continuous batching.",
            "retro_jax.experiments.bench.throughput_command:BenchThroughputFlags",
        ),
        "kernels": Entry(
            "retro_jax.experiments.bench.kernels:BenchKernels",
            "Measure the device time of operations on pages, beside the read bandwidth of the device.",
        ),
        "tpu-static": Entry(
            "retro_jax.experiments.tpu.command:BenchTpuStatic",
            "Predict decode steps on TPUs from bytes and from the compiler's schedules.",
        ),
    }


def _runs() -> Mapping[str, Entry]:
    from retro_jax.experiments.runs.configs import CONFIGS
    from retro_jax.experiments.tasks import describe

    return {
        name: Entry(
            "retro_jax.experiments.runs.run:Run",
            f"{describe(config.task)}, {config.model}",
            "retro_jax.experiments.runs.command:RunFlags",
            {"config": config, "name": name},
        )
        for name, config in CONFIGS.items()
    }


COMMANDS: Mapping[str, Entry | Group] = {
    "generate": Entry(
        "retro_jax.experiments.generate.command:Generate",
        "Continue prompts, or chat, with full attention, Quest or RetroAttention.",
    ),
    "score": Entry(
        "retro_jax.experiments.generate.score:Score",
        "Measure how likely a model finds a text when one method decodes along it.",
    ),
    "convert": Entry(
        "retro_jax.experiments.convert.command:Convert",
        "Write a model into a folder that loads at once, on one device or many.",
    ),
    "compare": Entry(
        "retro_jax.experiments.compare.command:Compare",
        "Run full attention, Quest, RetroAttention and others over the same text, and show what each loses.",
    ),
    "eval": Entry(
        "retro_jax.experiments.evals.command:Eval",
        "Answer tasks of the Language Model Evaluation Harness (lm-eval) by one method.",
    ),
    "study": Entry(
        "retro_jax.experiments.study.command:Study",
        "Measure on several models and kinds of text what a window repairs, what it could, and its rivals.",
    ),
    "overlap": Entry(
        "retro_jax.experiments.analyses.overlap:Overlap",
        "Measure how many of a query's pages earlier queries had loaded, or had only just missed.",
        "retro_jax.experiments.analyses.command:OverlapFlags",
    ),
    "distances": Entry(
        "retro_jax.experiments.analyses.distances:DistancesCommand",
        "Measure how far keys, values and outputs are from full attention's, with a window and without.",
        "retro_jax.experiments.analyses.command:DistancesFlags",
    ),
    "learn": Entry(
        "retro_jax.experiments.learn.command:Learn",
        "Train a score of pages on a model's own attention.",
    ),
    "bench": Group("Measure speed: of decoding a model, or of its kernels.", _benchmarks),
    "run": Group("Run a named configuration: a model, a task, and methods.", _runs),
    "report": Entry(
        "retro_jax.experiments.report.page:Report",
        "Make one page, as Markdown and for a browser, from the folders of one or more runs.",
        "retro_jax.experiments.report.command:ReportFlags",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command.

    What goes wrong is one line on stderr and exit status 2; with --traceback it is raised. Ctrl-C is status
    130. A reader of the output who leaves ends the command quietly with status 141, as SIGPIPE ends others.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    try:
        with _stoppable():
            try:
                _read(arguments).run()
            finally:
                if sys.stdout:
                    sys.stdout.flush()  # at the interpreter's end nobody could say in words that it failed
    except KeyboardInterrupt:
        print(STOPPED, end="", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        unread = isinstance(error, BrokenPipeError) and any(map(_is_unread, (sys.stdout, sys.stderr)))
        for stream in (sys.stdout, sys.stderr):
            _drop_unwritable(stream)
        if unread:
            sys.exit(UNREAD)
        if "--traceback" in arguments:
            raise
        print(f"retro-jax: error: {_words(error)}", file=sys.stderr)
        sys.exit(2)


def _read(arguments: Sequence[str]) -> "Output":
    """Reads a whole command line; shows help or the version and ends where that is asked for.

    Raises:
      ValueError: there is no such command.
    """
    prog, about, entries = "retro-jax", DESCRIPTION, COMMANDS
    if list(arguments[:1]) == ["--version"]:
        from importlib.metadata import version

        print(f"retro-jax {version('retro-jax')}, jax {version('jax')}")
        sys.exit()
    flag, *shells = (arguments[0] if arguments else "").split("=", 1)
    if flag == "--print-completion":
        print(_completion(*shells, *arguments[1:]))
        sys.exit()
    while True:
        word, *arguments = arguments or [""]
        if word in ("-h", "--help"):
            _show_help(prog, about, entries)
            sys.exit()
        if word not in entries:
            from retro_jax.models.names import nearest

            what = f"{word!r} is no command{nearest(word, entries)}" if word else "a command is missing"
            raise ValueError(f"{what}; use {prog} with one of {', '.join(entries)}, or --help")
        prog, entry = f"{prog} {word}", entries[word]
        if isinstance(entry, Entry):
            return entry.read(prog, arguments)
        about, entries = entry.summary, entry.entries()


def _completion(shell: str = "", *rest: str) -> str:
    """Returns the script by which a shell completes commands, flags and names that these take.

    Raises:
      ValueError: it is not one shell of `SHELLS`.
    """
    if shell not in SHELLS or rest:
        raise ValueError(
            f"--print-completion has {' '.join([shell, *rest])!r}; it needs one of {', '.join(SHELLS)}"
        )
    from retro_jax.experiments.io.completion import completion

    return completion(_as_one(COMMANDS), shell, set(_on_model(COMMANDS)))


def _on_model(entries: Mapping[str, Entry | Group]) -> Iterator[str]:
    """The words of commands whose argument is a model."""
    from retro_jax.experiments.io.flags import Command

    for name, entry in entries.items():
        if isinstance(entry, Group):
            yield from _on_model(entry.entries())
        elif issubclass(_find(entry.flags or entry.place), Command):
            yield name


def _as_one(entries: Mapping[str, Entry | Group]) -> object:
    """All commands as one type that tyro reads, for what it can do with a whole command line only."""
    from typing import Annotated, Union

    import tyro

    kinds = []
    for name, entry in entries.items():
        options = {}
        if isinstance(entry, Group):
            next_words = Annotated[_as_one(entry.entries()), tyro.conf.arg(name="")]
            kind = make_dataclass("Commands", [("command", next_words)])
        else:
            kind = _find(entry.flags or entry.place)
            options = {"default": kind(**entry.default)} if entry.default else {}
        about = tyro.conf.subcommand(name=name, description=entry.summary, **options)
        kinds.append(Annotated[kind, about])
    return Union[tuple(kinds)]  # noqa: UP007 (of a list)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within it Ctrl-C during an import ends the process, see `io.interrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    stop_in_words()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show_help(prog: str, about: str, entries: Mapping[str, Entry | Group]) -> None:
    parser = argparse.ArgumentParser(
        prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if entries is COMMANDS:
        parser.add_argument("--version", action="store_true", help="show the version and exit")
        parser.add_argument(
            "--print-completion", choices=SHELLS, help="print what completes commands and flags in a shell"
        )
    commands = parser.add_subparsers(title="commands; each has a --help", metavar="COMMAND")
    for name, entry in entries.items():
        commands.add_parser(name, help=entry.summary.replace("%", "%%"))
    print(parser.format_help(), end="")  # argparse itself would pass over errors of the stream


def _words(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return (
            f"out of memory ({text[:300] or 'of this machine'}); use fewer tokens or sequences, a smaller "
            "model or --dtype, or another device"
        )
    if text and isinstance(error, IN_WORDS):
        return text
    return f"{type(error).__name__}{f': {text}' if text else ''}; --traceback shows where it was raised"


def _is_unread(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def _drop_unwritable(stream: TextIO | None) -> None:
    """Drops what was printed and cannot be written, so that the interpreter does not try again at its end."""
    try:
        if stream:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
